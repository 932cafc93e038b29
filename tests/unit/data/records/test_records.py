"""Records of every schema that users bring: read where they have one meaning, else told by name."""

from pathlib import Path

import pytest
from conversations import say
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.records.conversations import BadRow, RecordOptions, parse_record
from orchestrator.data.rows import ImageReading, Turn

FOLDER = Path("pictures")
ASK = say("<image>\nWhat?", "A square.")
TEXT = say("Hello", "Hi")
OPENAI = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A square."}]
WANTED = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A square."))


def parsed(record, template="vicuna_v1", **options):
    return parse_record(7, record, FOLDER, template, RecordOptions(**options))


def reason(record, **options):
    with pytest.raises(BadRow) as told:
        parsed(record, **options)
    return str(told.value)


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "conversations": ASK},
        {"image": ["a.png"], "conversations": ASK},
        {"images": "a.png", "conversations": ASK},
        {"images": ["a.png"], "conversations": ASK},
        {"images": ["a.png"], "messages": OPENAI},
        {"image": "a.png", "messages": ASK},
        {"image": "a.png", "conversations": OPENAI},
        {"image": "a.png", "images": [], "videos": [], "audios": None, "tools": "", "system": "", "conversations": ASK},
        {"messages": [], "image": "a.png", "conversations": ASK},
        {"image": "a.png", "conversations": [dict(turn, loss=None, id=3) for turn in ASK]},
        {"image": "a.png", "conversations": [{"from": "system", "value": " "}, *ASK]},
        {"image": "a.png", "conversations": [ASK[0], {"from": "model", "value": "A square."}]},
        {
            "id": True,
            "image": "a.png",
            "conversations": ASK,
            "model": "gpt-4",
            "source": "coco",
            "width": 9,
            "height": 6,
        },
        {"id": ["x", {"y": 1}], "image": "a.png", "conversations": ASK, "metadata": {"a": float("nan")}, "meta_b": 1},
    ],
)
def test_one_meaning_is_read(record):
    row = parsed(record)
    assert row.turns == WANTED and [image.path for image in row.images] == ["pictures/a.png"] and row.index == 7


def part(kind, **values):
    return {"type": kind, **values}


@pytest.mark.parametrize(
    ("parts", "images"),
    [
        ([part("image"), part("text", text="\nWhat?")], ["a.png"]),
        ([part("image", image="a.png"), part("text", text="\nWhat?")], None),
        ([part("image", path="a.png"), part("text", text="\n"), part("text", text="What?")], None),
        ([part("image", url="a.png", text=None), part("text", text="\nWhat?")], None),
        ([part("image_url", image_url="a.png"), part("text", text="\nWhat?")], None),
        ([part("image_url", image_url={"url": "a.png"}), part("text", text="\nWhat?")], []),
        ([part("text", text="<image>\nWhat?")], ["a.png"]),
    ],
)
def test_openais_parts_are_read_in_their_order(parts, images):
    record = {"messages": [{"role": "user", "content": parts}, OPENAI[1]]}
    row = parsed(record if images is None else record | {"images": images})
    assert row.turns == WANTED and [image.path for image in row.images] == ["pictures/a.png"]


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "conversations": TEXT},
        {"system_prompt": "Be brief.", "conversations": TEXT},
        {"conversations": [{"from": "system", "value": "Be brief."}, *TEXT]},
        {"messages": [{"role": "system", "content": "Be brief."}, *TEXT]},
        {"messages": [{"role": "system", "content": [part("text", text="Be brief.")]}, *TEXT], "system": None},
    ],
)
def test_a_system_text_is_the_first_turn(record):
    assert parsed(record).turns == (Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", "Hi"))
    record = {**record, "image": "a.png"}
    key = "conversations" if "conversations" in record else "messages"
    record[key] = [*record[key][:-2], *ASK]
    assert "plain takes one question with an image and one answer; 3 turns with a system text" in _plain(record)


def _plain(record):
    with pytest.raises(BadRow) as told:
        parsed(record, "plain")
    return str(told.value)


FAULTS = {
    "videos": ({"videos": ["a.mp4"], "conversations": TEXT}, "`videos` is not read: videos are not read"),
    "audio": ({"audio": "a.wav", "conversations": TEXT}, "sounds are not read"),
    "tools": ({"tools": "[{}]", "conversations": TEXT}, "tools are not read"),
    "bbox": ({"bbox": [1, 2], "conversations": TEXT}, "`bbox` is not read: places in an image"),
    "weight": (
        {"weight": 0.5, "conversations": TEXT},
        "it would weigh the loss; if nothing is lost with it, name it in",
    ),
    "zero is a value": ({"weight": 0, "conversations": TEXT}, "`weight` is not read"),
    "rejected": ({"rejected": "b", "conversations": TEXT}, "pairs of preferences"),
    "near name": ({"imagse": ["a.png"], "conversations": TEXT}, "`imagse` is not read: did you mean image?"),
    "near name of the text": ({"systen": "Be brief.", "conversations": TEXT}, "did you mean system?"),
    "unknown": ({"xyzzy": 1, "qux": 2, "conversations": TEXT}, "`xyzzy`, `qux` are not read; if"),
    "alpaca": (
        {"instruction": "a", "input": "", "output": "b"},
        "it has instruction, input, output (this looks like Alp",
    ),
    "ms-swift": (
        {"query": "a", "response": "b", "images": ["a.png"]},
        "it has query, response, images (this looks like",
    ),
    "text": (
        {"text": "a"},
        "it has text (this looks like plain text); `conversations` is missing (LLaVA's format: conversations, image)",
    ),
    "vqa": ({"image": "a.png", "question": "a", "answer": "b"}, "questions and answers"),
    "conversation": ({"conversation": ASK}, "it has conversation (did you mean conversations?)"),
    "nothing": ({}, "it has no keys; `conversations` is missing (LLaVA's format: conversations, image)"),
    "id alone": ({"id": 3}, "it has id; `conversations` is missing"),
    "both images": ({"image": "a.png", "images": ["b.png"], "conversations": ASK}, "both `image` and `images`"),
    "both turns": ({"conversations": TEXT, "messages": TEXT}, "both `conversations` and `messages`"),
    "both systems": ({"system": "a", "system_prompt": "b", "conversations": TEXT}, "both `system` and `system_prompt`"),
    "system twice": ({"system": "a", "conversations": [{"from": "system", "value": "b"}, *TEXT]}, "a turn from system"),
    "system late": (
        {"conversations": [*TEXT, {"from": "system", "value": "b"}]},
        "turn 2 is from system, expected human",
    ),
    "system alone": ({"conversations": [{"from": "system", "value": "b"}]}, "the conversation has no answer"),
    "system is a list": ({"system": ["a"], "conversations": TEXT}, "`system` is ['a'], not a string"),
    "image in system": (
        {"system": "<image>", "image": "a.png", "conversations": TEXT},
        "the system text holds <image>",
    ),
    "images without marks": (
        {"images": ["a.png"], "conversations": TEXT},
        "0 <image> in the conversation, 1 images in `im",
    ),
    "fewer images": (
        {"images": ["a.png"], "conversations": say("<image><image>", "b")},
        "2 <image> in the conversation, 1",
    ),
    "marks alone": ({"conversations": ASK}, "1 <image> in the conversation, 0 images"),
    "nested list": ({"image": [["a.png"]], "conversations": ASK}, "a path or a list of paths, this is ['a.png']"),
    "image is false": ({"image": False, "conversations": ASK}, "a path or a list of paths, this is False"),
    "image is nothing": ({"image": "", "conversations": ASK}, "a path or a list of paths, this is ''"),
    "image as bytes": ({"image": {"bytes": "x"}, "conversations": ASK}, "this is {'bytes': 'x'}"),
    "turn's loss": (
        {"conversations": [TEXT[0], dict(TEXT[1], loss=True)]},
        "`loss` of turn 1 is not read: it would weigh",
    ),
    "turn's weight": ({"conversations": [dict(TEXT[0], weight=0), TEXT[1]]}, "`weight` of turn 0 is not read"),
    "turn's calls": ({"messages": [OPENAI[0], dict(OPENAI[1], tool_calls=[1])]}, "`tool_calls` of turn 1 is not read"),
    "mixed turn": ({"conversations": [TEXT[0], dict(TEXT[1], content="b")]}, "either `from` and `value` or `role` and"),
    "tool turn": (
        {"messages": [OPENAI[0], {"role": "tool", "content": "b"}]},
        "turn 1 is from 'tool'; a turn is from user",
    ),
    "null answer": ({"messages": [TEXT[0], {"role": "assistant", "content": None}]}, "the text of turn 1 is None"),
    "number": ({"messages": [TEXT[0], {"role": "assistant", "content": 7}]}, "the text of turn 1 is 7, not a string"),
    "blank answer": ({"conversations": say("a", " \n\t\u3000")}, "the answer of turn 1 is empty"),
    "blank parts": ({"messages": [TEXT[0], {"role": "assistant", "content": []}]}, "the answer of turn 1 is empty"),
    "audio part": (
        {"messages": [{"role": "user", "content": [part("input_audio")]}, TEXT[1]]},
        "of type 'input_audio'",
    ),
    "text is a part": (
        {"messages": [{"role": "user", "content": ["a"]}, TEXT[1]]},
        "a mapping with `type`, this is 'a'",
    ),
    "part with more": (
        {"messages": [{"role": "user", "content": [part("image", image="a.png", bbox=[1])]}, TEXT[1]]},
        "a part of turn 0 has type, image, bbox; beside `type` one of image, path, url, image_url is read",
    ),
    "image in both": (
        {"images": ["a.png"], "messages": [{"role": "user", "content": [part("image", image="b.png")]}, TEXT[1]]},
        "both in `images` and in the turns",
    ),
    "half an emoji": ({"conversations": say("what \ud83d?", "b")}, "the text of turn 0 holds '\\ud83d', half of an"),
    "half in an answer": ({"conversations": say("a", "b\udd25")}, "the text of turn 1 holds '\\udd25'"),
    "half in a system text": ({"system": "\ud83d", "conversations": TEXT}, "`system` holds '\\ud83d'"),
    "half in a path": ({"image": "\ud83d.png", "conversations": ASK}, "the image's path holds '\\ud83d'"),
    "NUL": ({"conversations": say("a\0", "b")}, "the text of turn 0 holds a NUL character"),
    "URL": ({"image": "https://x.org/a.png", "conversations": ASK}, "https://x.org/a.png is not a path; download it"),
    "S3": ({"image": "s3://bucket/a.png", "conversations": ASK}, "is not a path"),
    "data URL": ({"image": "data:image/png;base64,iVBO", "conversations": ASK}, "is not a path"),
    "file URL": ({"image": "file:///a.png", "conversations": ASK}, "is not a path"),
    "drive": ({"image": "C:/a.png", "conversations": ASK}, "is a Windows path"),
    "backslash": ({"image": "train\\a.png", "conversations": ASK}, "is a Windows path; write it with /"),
    "absolute": ({"image": "/etc/a.png", "conversations": ASK}, "lies outside image_folder; set allow_outside_image_f"),
    "upwards": ({"image": "../a.png", "conversations": ASK}, "../a.png lies outside image_folder"),
    "upwards within": ({"image": "x/../../a.png", "conversations": ASK}, "lies outside image_folder"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_not_read_is_told_by_name(case):
    record, words = FAULTS[case]
    assert words in reason(record)


def test_what_a_data_set_may_allow():
    record = {"image": "a.png", "conversations": [dict(turn, weight=1) for turn in ASK], "score": 3}
    assert parsed(record, ignore_keys=("score", "weight")).turns == WANTED
    # What is left out by name is not there: the image is missed, not forgotten.
    assert "1 <image> in the conversation, 0 images" in reason(record, ignore_keys=("score", "weight", "image"))
    assert parsed({"system": "x", "conversations": TEXT}, ignore_keys=("system",)).turns[0].role == "user"
    for name, path in {"/a/b.png": "/a/b.png", "../b.png": "pictures/../b.png"}.items():
        row = parsed({"image": name, "conversations": ASK}, allow_outside_image_folder=True)
        assert [image.path for image in row.images] == [path]
    inside = parse_record(0, {"image": "/a/b/c.png", "conversations": ASK}, Path("/a"), "plain")
    assert inside.images[0].path == "/a/b/c.png"
    reading = ImageReading(pad=True, ambiguous="viewer")
    assert parsed({"image": "a.png", "conversations": ASK}, reading=reading).images[0].reading == reading


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", " ", "<image>", "a.png", "\ud83d", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "type", "text", "image", "url", "image_url"]), inner
        )
    ),
    max_leaves=12,
)
_SAID = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool"])
_TURNS = st.lists(st.fixed_dictionaries({"role": _SAID, "content": _VALUES}) | _VALUES, max_size=4)
_KEYS = ["image", "images", "conversations", "messages", "system", "system_prompt", "id", "video"]


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES | _TURNS, max_size=4) | _VALUES)
def test_anything_is_a_row_or_a_bad_one(record):
    try:
        row = parsed(record)
    except BadRow as error:
        assert str(error).isprintable()
        return
    assert row.turns[-1].text.encode() and sum(turn.text.count("<image>") for turn in row.turns) == len(row.images)
