"""Small data sets in the schemas of POPE, GQA, MME and TextVQA on the hub, of pictures that packages ship.

lmms-eval's own definitions find them by the hub's names, as folders in the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value
from easy_vqa import get_test_image_paths, get_test_questions
from PIL import Image as Pillow
from sklearn.datasets import load_digits

TEXT, WHOLE, TRUTH = Value("string"), Value("int64"), Value("bool")


def write_hub(folder: Path, questions: int = 8) -> None:
    """Write all four, of so many questions each."""
    write_pope(folder, questions)
    write_gqa(folder, questions)
    write_mme(folder, questions // 2)
    write_textvqa(folder, questions)


def write_pope(folder: Path, questions: int) -> None:
    """Yes or no about easy-VQA's pictures."""
    asked = [each for each in _easy_vqa() if each[1] in ("yes", "no")][:questions]
    rows = [
        {
            "id": str(number), "question_id": str(number), "question": question, "answer": answer,
            "image_source": f"easy_vqa_{name}", "image": picture, "category": "random",
        }
        for number, (question, answer, name, picture) in enumerate(asked)
    ]  # fmt: skip
    columns = dict.fromkeys(("id", "question_id", "question", "answer", "image_source", "category"), TEXT)
    _write(folder / "lmms-lab/POPE/data/test-00000-of-00001.parquet", rows, {**columns, "image": Image()})


def write_gqa(folder: Path, questions: int) -> None:
    """Colours and shapes of easy-VQA's pictures; GQA keeps questions and pictures apart."""
    asked = [each for each in _easy_vqa() if each[1] not in ("yes", "no")][:questions]
    place = folder / "lmms-lab/GQA"
    rows = [
        {
            "id": str(number), "imageId": name, "question": question, "isBalanced": True, "answer": answer,
            "fullAnswer": f"It is {answer}.", "groups": {"global": "", "local": ""},
        }
        for number, (question, answer, name, _) in enumerate(asked)
    ]  # fmt: skip
    columns: dict[str, Any] = dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), TEXT)
    columns |= {"isBalanced": TRUTH, "groups": {"global": TEXT, "local": TEXT}}
    _write(place / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", rows, columns)
    pictures = [{"id": name, "image": picture} for name, picture in {each[2]: each[3] for each in asked}.items()]
    file = place / "testdev_balanced_images/testdev-00000-of-00001.parquet"
    _write(file, pictures, {"id": TEXT, "image": Image()})
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: testdev\n    path: {name}/testdev-*\n"
        for name in ("testdev_balanced_instructions", "testdev_balanced_images")
    )
    (place / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def write_mme(folder: Path, pictures: int) -> None:
    """Two questions about the number on each of scikit-learn's digits, in two subtasks of perception."""
    digits = load_digits()
    rows = []
    for number in range(pictures):
        shown, category = int(digits.target[number]), ("OCR", "count")[number % 2]
        for asked, answer in ((shown, "Yes"), ((shown + 1) % 10, "No")):
            question = f"Is the number {asked} written here? Please answer yes or no."
            picture = _digit(digits.images[number])
            rows.append({"question_id": f"{category}/{number}.png", "image": picture, "question": question,
                         "answer": answer, "category": category})  # fmt: skip
    columns = dict.fromkeys(("question_id", "question", "answer", "category"), TEXT)
    _write(folder / "lmms-lab/MME/data/test-00000-of-00001.parquet", rows, {**columns, "image": Image()})


def write_textvqa(folder: Path, questions: int) -> None:
    """The number on each of scikit-learn's digits, as ten people would say it; the test split has no answers."""
    digits = load_digits()
    rows = [
        {
            "image_id": f"digit{number}", "question_id": number, "question": "what number is written here?",
            "image": _digit(digits.images[number]), "image_width": 64, "image_height": 64,
            "answers": [str(digits.target[number])] * 9 + ["a number"], "ocr_tokens": [str(digits.target[number])],
            "image_classes": ["Digit"], "set_name": "val",
        }
        for number in range(questions)
    ]  # fmt: skip
    columns: dict[str, Any] = dict.fromkeys(("image_id", "question", "set_name"), TEXT)
    columns |= dict.fromkeys(("question_id", "image_width", "image_height"), WHOLE) | {"image": Image()}
    columns |= dict.fromkeys(("answers", "ocr_tokens", "image_classes"), Sequence(TEXT))
    place = folder / "lmms-lab/textvqa/data"
    _write(place / "validation-00000-of-00001.parquet", rows, columns)
    _write(place / "test-00000-of-00001.parquet", [{**row, "answers": [], "set_name": "test"} for row in rows], columns)


def _easy_vqa() -> list[tuple[str, str, str, str]]:
    """Question, answer, the picture's name and file of easy-VQA's test split."""
    texts, answers, numbers = get_test_questions()
    paths = get_test_image_paths()
    return [(t, a, str(n), paths[n]) for t, a, n in zip(texts, answers, numbers, strict=True)]


def _digit(pixels: np.ndarray) -> Pillow.Image:
    picture = Pillow.fromarray((pixels * 255 / 16).astype(np.uint8))
    return picture.resize((64, 64), Pillow.Resampling.NEAREST)


def _write(file: Path, rows: list[dict[str, Any]], columns: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(columns)).to_parquet(str(file))
