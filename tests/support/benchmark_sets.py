"""POPE and MME in the schemas of their releases, of small drawn pictures, and as LLaVA's records."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

CATEGORIES = ("random", "popular", "adversarial")


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (40 * number % 256, 90 * number % 256, 17 * number % 256)).save(path)


def write_pope(folder: Path, questions: int = 4) -> list[dict]:
    """`coco_pope_CATEGORY.json`: JSON lines of `question_id`, `image`, `text`, `label`; returns LLaVA's records."""
    records = []
    for category in CATEGORIES:
        lines = []
        for number in range(questions):
            name = f"COCO_val2014_{number // 2:012}.jpg"
            draw(folder / "val2014" / name, number // 2)
            thing = ("a snowboard", "a dining table", "a car", "a person")[number % 4]
            line = {"question_id": number + 1, "image": name, "text": f"Is there {thing} in the image?"}
            lines.append({**line, "label": ("yes", "no")[number % 2]})
        (folder / f"coco_pope_{category}.json").write_text("\n".join(map(json.dumps, lines)))
        for line in map(json.loads, (folder / f"coco_pope_{category}.json").read_text().splitlines()):
            records.append(record(f"val2014/{line['image']}", line["text"], line["label"], category=category))
    return records


def write_mme(folder: Path, pictures: int = 2) -> list[dict]:
    """A folder a subtask with `NAME.jpg` and `NAME.txt`, two lines of question and answer; returns LLaVA's records."""
    from orchestrator_plugins.evaluations.mme import COGNITION, PERCEPTION

    records = []
    for task in (*PERCEPTION, *COGNITION):
        for number in range(pictures):
            draw(folder / task / f"{number:04}.jpg", number)
            asked = f"Is this picture number {number}? Please answer yes or no."
            denied = f"Is this a picture of {task}? Please answer yes or no."
            (folder / task / f"{number:04}.txt").write_text(f"{asked}\tYes\n{denied}\tNo\n")
            for line in (folder / task / f"{number:04}.txt").read_text().splitlines():
                question, answer = line.split("\t")
                records.append(record(f"{task}/{number:04}.jpg", question, answer, category=task))
    return records


def record(image: str, question: str, answer: str, **columns) -> dict:
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": said, **columns}
