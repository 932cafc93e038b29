"""Videos in an experiment file: checked, shown, planned, refused where there are none, on pages as strips of frames."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest

pytest.importorskip("av")
from clips import random_frames, write_clip
from conversations import say
from PIL import Image
from repository import MODELS

from orchestrator.data.check import check_document, row_document
from orchestrator.data.rows import ImageReading, ImageRef, Row, Turn
from orchestrator.errors import SpecError
from orchestrator.evaluation.protocol import prediction
from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.documents import variant_documents
from orchestrator.plan.experiment_plan import prepare
from orchestrator.report.console import print_row
from orchestrator.report.documents import Document
from orchestrator.report.pages import predictions_page, row_page
from orchestrator.report.statistics import score_interval, scores_of

RECORDS = [
    {"video": "a.mov", "conversations": say("<video>\nWhich way?", "left")},
    {"image": "0.png", "conversations": say("<image>\nWhat is it?", "A square.")},
    {"conversations": say("Nothing to see?", "No.")},
]
FILE = """
schema_version: 1
name: videos
model: {{model_name_or_path: {model}, weights: random}}
data:
  mine: {{kind: llava_json, data_path: data.json, image_folder: {pictures}, video_folder: ., num_frames: 4}}
compressors:
  pooled: {{kind: average_pool, layer: 0, stride: 3}}
  changed: {{kind: evs, layer: 0, pruning_rate: 0.5}}
  still: [{{kind: frame_pool, layer: 0, frames: 2}}, {{kind: average_pool, layer: 2, stride: 3}}]
phases:
  finetune:
    {{data: mine, train: [projector], schedule: full, max_steps: 2, global_batch_size: 2,
      per_device_train_batch_size: 2, learning_rate: 1.0e-3, model_max_length: 256, deepspeed: zero0}}
evaluate:
  vqa: {{kind: exact_match, data: mine}}
matrix: {{phases.finetune.schedule: [pooled, changed, still]}}
"""


@pytest.fixture
def experiment(tmp_path, pictures):
    write_clip(tmp_path / "a.mov", random_frames(9, 40, 60), rate=3)

    def write(records=RECORDS):
        (tmp_path / "data.json").write_text(json.dumps(records))
        path = tmp_path / "videos.yaml"
        path.write_text(FILE.format(model=MODELS / "tiny-onevision", pictures=pictures))
        return path

    return write


def test_every_row_is_tried_and_one_is_shown_as_the_model_gets_it(experiment):
    cells = prepare(experiment()).cells
    mine = check_document(cells)["sets"][0]
    assert mine["errors"] == [] and mine["rows"] == 3
    assert mine["lengths"]["visual_tokens"]["max"] == 16 + 4 * 5  # the image's base tile, and its rows with newlines
    found = row_document(cells, "mine", 0)
    (video,) = found["images"]
    assert (video["frames"], video["frame_rate"], video["visual_tokens"]) == ([0, 2, 5, 8], 3.0, 4 * 4 + 1)
    assert (video["width"], video["height"]) == (60, 40)
    assert [token["count"] for token in found["tokens"] if token["text"] == "<video>"] == [17]
    text = Document(found, print_row).to_text()
    assert "4 frames (0, 2, 5, 8) of a video of 3 a second, 60 x 40 pixels, 17 visual tokens" in text
    assert strips(row_page(found)) == [(4 * (144 + 2) - 2, 96)]


def strips(html):
    """Sizes of the pictures of a page."""
    codes = re.findall(r"data:image/jpeg;base64,([^\"]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(code))).size for code in codes]


def test_broken_clips_are_told_by_row_with_file_and_fault(experiment, tmp_path):
    data = (tmp_path / "a.mov").read_bytes()
    (tmp_path / "cut.mov").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mov").touch()
    bad = [{"video": f"{name}.mov", "conversations": say("<video>?", "a")} for name in ("cut", "empty", "gone")]
    mine = check_document(prepare(experiment([*RECORDS, *bad])).cells)["sets"][0]
    errors = {entry["row"]: entry["error"] for entry in mine["errors"]}
    assert errors.keys() == {3, 4, 5} and mine["rows"] == 6
    for row, words in ((3, "cut.mov is cut off: it is to have"), (4, "empty.mov is empty"), (5, "gone.mov is missing")):
        assert words in errors[row]


def test_costs_count_frames_and_what_methods_leave_of_them(experiment):
    """Means over the video (4 frames of 2 x 2 tokens, a newline) and the image (4 x 4, and 4 rows of 5)."""
    documents = variant_documents(prepare(experiment()).cells, Costs().rows)
    found = {one["name"]: one["layer_average_tokens"] for one in documents}
    image, layers = 16 + 20, 4
    # ceil(4 / 3) of a frame, 6 and 7 of the image
    assert found["pooled"] == pytest.approx((4 * 2 + 1 + 6 + 7) / 2)
    assert found["changed"] == pytest.approx((8 + 1 + image) / 2)  # half of all frames' tokens
    still = (layers / 2 * (8 + 1 + image) + layers / 2 * (2 * 2 + 1 + 6 + 7)) / layers
    assert found["still"] == pytest.approx(still / 2)


def test_methods_across_frames_are_refused_where_no_row_has_a_video(experiment):
    assert prepare(experiment())
    with pytest.raises(SpecError) as told:
        prepare(experiment(RECORDS[1:]))
    text = str(told.value)
    assert "evs acts across the frames of a video, and no data here has videos" in text
    assert "frame_pool acts across the frames of a video" in text and "average_pool acts" not in text


def test_answers_stand_beside_strips_and_videos_are_clusters(tmp_path):
    path = write_clip(tmp_path / "a.mov", random_frames(9, 40, 60))
    video = ImageRef(path, ImageReading(num_frames=3), video=True)
    row = Row(7, (video,), (Turn("user", "<video>\nWhich way?"), Turn("assistant", "left")))
    answers = [prediction(row, answer, "left", answer == "left") for answer in ("left", "up")]
    assert answers[0]["images"] == [] and answers[0]["videos"] == [{"path": path, "num_frames": 3, "fps": None}]
    document = {
        "experiment": "e", "cell": "c", "evaluation": "vqa", "under": "final", "metrics": {"accuracy": 0.5},
        "num_samples": 2, "only_wrong": False, "predictions": answers,
    }  # fmt: skip
    html = predictions_page(document)
    assert strips(html) == [(3 * 146 - 2, 96)] * 2 and "&lt;video&gt;" not in html
    assert [one["images"] for one in scores_of(answers)] == [[path]] * 2
    assert score_interval(answers) is None  # two answers about one clip are one cluster
    answers[0]["videos"][0]["path"] = "/gone.mp4"
    assert "/gone.mp4 is missing" in predictions_page(document)
