"""Render a conversation as one text, with the character ranges that the assistant speaks.

Sources: LLaVA, `llava/conversation.py` (`conv_llava_plain`, `conv_vicuna_v1`) and `llava/train/train.py`
(`preprocess_multimodal`, `preprocess_plain`, `preprocess_v1`).
"""

from __future__ import annotations

import inspect
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.data.rows import IMAGE_MARK, VIDEO_MARK, Row, Turn
from orchestrator.errors import DataError


def takes_suffix(processor: Any) -> bool:
    """Return whether a processor's call has a `suffix`."""
    return "suffix" in inspect.signature(type(processor).__call__).parameters


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


_A_LIST = "{'type': 'text'"
"""In the output of a template that reads strings only: Python's representation of a message's parts."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: With the model's own placeholder for an image or a video, one each until it is expanded.
        answers: Character ranges `[first, last)` that carry the loss, in order.
        images: Character ranges of the text of each image and video; set by `expand`.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    images: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ChatFormat:
    """What a template needs of a tokenizer.

    Attributes:
        image_token: Placeholder of one image in the text that the model's processor reads.
        eos_token: Ends an answer.
        render: `(messages, add_generation_prompt) -> text` by the tokenizer's own chat template.
        render_marked: `messages -> (text, answer ranges)` if the template itself marks generation, else None.
        video_token: Placeholder of one video; None where the model reads none.
    """

    image_token: str
    eos_token: str
    render: Callable[[Sequence[dict[str, Any]], bool], str]
    render_marked: Callable[[Sequence[dict[str, Any]]], tuple[str, list[tuple[int, int]]]] | None = None
    video_token: str | None = None

    def token_of(self, mark: str) -> str:
        """Return the model's placeholder for what a mark stands for."""
        return self.video_token if mark == VIDEO_MARK and self.video_token is not None else self.image_token

    def tokens_of(self, row: Row) -> tuple[str, ...]:
        """Return the placeholders of a row's images and videos, in order.

        Raises:
            DataError: it has a video, and the model reads none.
        """
        if self.video_token is None and any(image.video for image in row.images):
            raise DataError(f"row {row.index}: it has a video, and this model's processor reads none here")
        return tuple(self.token_of(VIDEO_MARK if image.video else IMAGE_MARK) for image in row.images)


def suffix_format(image_token: str, bos_token: str, eos_token: str) -> ChatFormat:
    """Return what stands in for a chat template where a model reads one question and writes one answer.

    Args:
        image_token: Placeholder of one image.
        bos_token: Comes after the images.
        eos_token: Ends the answer.
    """

    def render_marked(messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["user", "assistant"]):
            raise DataError(
                f"this model reads one question and writes one answer, not {len(roles)} turns; take such rows out, or "
                "give its processor a chat template"
            )
        parts = messages[0]["content"]
        images = image_token * sum(part["type"] == "image" for part in parts)  # no such model takes videos
        question = " ".join(part["text"] for part in parts if part["type"] == "text")
        text = f"{images}{bos_token}{question}\n"
        if len(messages) == 1:
            return text, []
        answer = "".join(part["text"] for part in messages[1]["content"]) + eos_token
        return text + answer, [(len(text), len(text) + len(answer))]

    return ChatFormat(image_token, eos_token, lambda messages, _: render_marked(messages)[0], render_marked)


def render(template: str, row: Row, chat: ChatFormat, prompt_only: bool = False) -> Rendered:
    """Return the text of a row.

    Args:
        template: `plain`, `vicuna_v1` or `chat_template`.
        row: The conversation.
        chat: The tokenizer's chat format.
        prompt_only: Whether to end where the assistant's last answer would begin.

    Raises:
        DataError: the row does not fit the template.
    """
    turns = row.turns
    if prompt_only:
        last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
        turns = turns[:last]
    tokens = chat.tokens_of(row)
    rendered = _TEMPLATES[template](row, turns, chat, prompt_only)
    known = {chat.token_of(mark): mark.strip("<>") for mark in row.marks}
    for token, called in known.items():
        if rendered.text.count(token) != tokens.count(token):
            raise DataError(
                f"row {row.index}: {rendered.text.count(token)} {called} placeholders in the text rendered by "
                f"{template}, {tokens.count(token)} {called}s"
            )
    if len(known) > 1 and re.findall("|".join(map(re.escape, known)), rendered.text) != list(tokens):
        raise DataError(
            f"row {row.index}: {template} of this model writes images and videos in another order than the row has "
            "them; write the row in that order"
        )
    return rendered


def expand(rendered: Rendered, tokens: Sequence[str], texts: Sequence[str]) -> Rendered:
    """Replace each image's and video's placeholder by the processor's text for it, and shift the ranges of answers
    accordingly.

    Args:
        rendered: A row's text.
        tokens: The placeholders in it, in order.
        texts: The text of each; placeholders of further ones stay.
    """
    before, after, images, position, place = [0], [0], [], 0, 0
    written = []
    for token, text in zip([*tokens, ""], [*texts, *tokens[len(texts) :], ""], strict=True):
        start = rendered.text.index(token, position) if token else len(rendered.text)
        piece = rendered.text[position:start]
        position, place = start, place + len(piece)
        written += [piece, text]
        images.append((place, place + len(text)))
        position, place = position + len(token), place + len(text)
        before.append(position)
        after.append(place)

    def moved(index: int) -> int:
        number = bisect_right(before, index) - 1
        return index - before[number] + after[number]

    answers = tuple((moved(first), moved(last)) for first, last in rendered.answers)
    return Rendered("".join(written), answers, tuple(images[:-1]))


def _plain(row: Row, turns: Sequence[Turn], chat: ChatFormat, prompt_only: bool) -> Rendered:
    """Render the image, the caption and a newline, without the user's words, as in LLaVA's pretraining."""
    if not row.images or [turn.role for turn in row.turns] != ["user", "assistant"]:
        raise DataError(
            f"row {row.index}: plain takes one question with an image and one answer (the caption), no system text"
        )
    images = "".join(chat.tokens_of(row))
    if prompt_only:
        return Rendered(images, ())
    text = f"{images}{turns[1].text}\n"
    return Rendered(text, ((len(images), len(text)),))


def _vicuna_v1(row: Row, turns: Sequence[Turn], chat: ChatFormat, prompt_only: bool) -> Rendered:
    """Render LLaVA-1.5's prompt; the space before an answer belongs to it, since tokenizers join it to the first word.

    A row's system text replaces LLaVA's own.
    """
    text, answers = f"{_system_of(turns) or VICUNA_SYSTEM} ", []
    for turn in turns:
        if turn.role == "system":
            continue
        if turn.role == "user":
            text += f"USER: {_image_first(turn.text, row.marks, chat)} "
        else:
            text += "ASSISTANT:"
            first = len(text)
            text += f" {turn.text}{chat.eos_token}"
            answers.append((first, len(text)))
    return Rendered(text + "ASSISTANT:" if prompt_only else text, tuple(answers))


def _image_first(text: str, marks: Sequence[str], chat: ChatFormat) -> str:
    """Move a single image (or video) to the front of its turn, as `preprocess_multimodal` does; several stay in place.

    LLaVA's own code would merge several images of a turn into one.
    """
    found = [mark for mark in marks for _ in range(text.count(mark))]
    if len(found) == 1:
        text = f"{found[0]}\n{text.replace(found[0], '').strip()}".strip()
    for mark in marks:
        text = text.replace(mark, chat.token_of(mark))
    return text


def _system_of(turns: Sequence[Turn]) -> str | None:
    return turns[0].text.strip() if turns and turns[0].role == "system" else None


def _chat_template(row: Row, turns: Sequence[Turn], chat: ChatFormat, prompt_only: bool) -> Rendered:
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": _parts(turn.text, row.marks)} for turn in turns]
    system = _system_of(turns)
    if system is not None:
        messages[0]["content"], refusal = _system_content(system, chat)
        if refusal:
            raise DataError(
                f"row {row.index}: it has a system text, and the model's chat template {refusal}; "
                "use conversation_template vicuna_v1, or leave the text out with ignore_keys: [system]"
            )
    answers: list[tuple[int, int]] = []
    if prompt_only:
        text = chat.render(messages, True)
    elif chat.render_marked is not None:
        text, answers = chat.render_marked(messages)
    else:
        text, answers = _answers_by_prefix(row, messages, chat)
    if _A_LIST in text and not any(_A_LIST in turn.text for turn in turns):
        raise DataError(
            f"row {row.index}: the model's chat template reads strings, not parts of text and image; "
            "use conversation_template vicuna_v1 or a template for images"
        )
    if answers and chat.eos_token not in text[answers[-1][0] : answers[-1][1]]:
        # With a template that never ends an answer, the model would learn never to stop.
        first, last = answers[-1]
        text = text[:last] + chat.eos_token + text[last:]
        answers[-1] = (first, last + len(chat.eos_token))
    return Rendered(text, tuple(answers))


@lru_cache(maxsize=256)
def _system_content(system: str, chat: ChatFormat) -> tuple[Any, str]:
    """Return the system text in the form that the template reads, a list of parts or a string; else None and why not.

    A template may omit the text, refuse it, or write it as the user's.
    """
    question, refusal = {"role": "user", "content": _parts("Hello", (IMAGE_MARK,))}, "leaves it out"
    for content in ([{"type": "text", "text": system}], system):
        try:
            text = chat.render([{"role": "system", "content": content}, question], True)
            as_user = chat.render([{"role": "user", "content": content}, question], True)
        # Templates refuse with jinja's own error, and fail with any other on a form that they do not know.
        except Exception as error:
            if isinstance(error, DataError):
                raise
            refusal = f"refuses it: {error}"
            continue
        if system not in text or _A_LIST in text.replace(system, ""):
            continue
        if text != as_user:
            return content, ""
        refusal = "takes it for the user's words"
    return None, refusal


def _parts(text: str, marks: Sequence[str]) -> list[dict[str, str]]:
    """Return a turn's text, images and videos in order; templates put their own newlines around an image."""
    parts: list[dict[str, str]] = []
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text)
    for piece in pieces:
        if piece in marks:
            parts.append({"type": piece.strip("<>")})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip() if len(pieces) > 1 else piece})
    return parts


def _answers_by_prefix(
    row: Row, messages: Sequence[dict[str, Any]], chat: ChatFormat
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and its answers: an answer is what follows the generation prompt before it."""
    text, answers = chat.render(messages, False), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat.render(messages[:number], True)
        after = chat.render(messages[: number + 1], False)
        if not text.startswith(before) or not after.startswith(before):
            raise DataError(
                f"row {row.index}: the tokenizer's chat template changes earlier turns, so the start of an answer "
                "is unknown; use conversation_template vicuna_v1 or a template with {% generation %}"
            )
        same = next((i for i, (a, b) in enumerate(zip(text, after, strict=False)) if a != b), len(after))
        answers.append((len(before), same))
    return text, answers


_TEMPLATES = {"plain": _plain, "vicuna_v1": _vicuna_v1, "chat_template": _chat_template}
TEMPLATES = tuple(_TEMPLATES)


_JINJA_TEXT = """{%- macro text(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}\
{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"""
_JINJA = {
    "plain": _JINJA_TEXT
    + """{% for message in messages %}{% if message['role'] == 'assistant' %}{{ text(message['content']) + '\\n' }}\
{% elif message['content'] is not string %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}IMAGE_TOKEN{% endif %}{% endfor %}{% endif %}{% endfor %}""",
    "vicuna_v1": _JINJA_TEXT
    + """{% if messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) | trim }}{% else %}SYSTEM{% endif %} \
{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}{% if message['content'] is string %}\
{{ message['content'] }}{% else %}{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}\
{% if images | length == 1 %}{{ ('IMAGE_TOKEN\\n' + text(message['content']) | trim) | trim }}{% else %}\
{% for part in message['content'] %}{{ 'IMAGE_TOKEN' if part['type'] == 'image' else part['text'] }}{% endfor %}\
{% endif %}{% endif %}{{ ' ' }}{% elif message['role'] == 'assistant' %}\
{{ 'ASSISTANT: ' + text(message['content']) + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
}

_TOKEN_OF = "('VIDEO_TOKEN' if {part}['type'] == 'video' else 'IMAGE_TOKEN')"
_WITH_VIDEOS = {
    "{% if part['type'] == 'image' %}IMAGE_TOKEN{% endif %}": (
        "{% if part['type'] in ('image', 'video') %}{{ " + _TOKEN_OF.format(part="part") + " }}{% endif %}"
    ),
    "selectattr('type', 'equalto', 'image')": "selectattr('type', 'in', ['image', 'video'])",
    "('IMAGE_TOKEN\\n' + text(": f"({_TOKEN_OF.format(part='images[0]')} ~ '\\n' ~ text(",
    "'IMAGE_TOKEN' if part['type'] == 'image' else part['text']": (
        f"part['text'] if part['type'] == 'text' else {_TOKEN_OF.format(part='part')}"
    ),
}
"""What the templates become for models that read videos too."""


def jinja_of(template: str, image_token: str, video_token: str | None = None) -> str | None:
    """Return a chat template for transformers that writes what `render` does; None for the tokenizer's own."""
    source = _JINJA.get(template)
    if source is not None and video_token is not None:
        for alone, both in _WITH_VIDEOS.items():
            source = source.replace(alone, both)
        source = source.replace("VIDEO_TOKEN", video_token)
    return source and source.replace("SYSTEM", VICUNA_SYSTEM).replace("IMAGE_TOKEN", image_token)
