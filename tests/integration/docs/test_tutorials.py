"""The pages are run: every command and file of a tutorial works as it stands."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, blocks, run_page

DOCS = ROOT / "docs"
QUESTION = next(
    block.text for block in blocks(DOCS / "tutorials" / "own-data.md") if block.text.startswith("question = ")
)
# The page's own question, asked of every row of the test: the tokens of training, the answers of the table.
SAME_ANSWERS = f"""
import contextlib, io
from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import VisionTextProcessor
from orchestrator.data.records.row_index import open_rows
from orchestrator.data.rows import data_spec

cell = llv.load("mine.yaml").cell("schedule=heavy")
encoder = Encoder(VisionTextProcessor(processor, model.config), "chat_template", 2048)
rows = open_rows(data_spec(cell.cell.phases[0].data[0]["spec"]))
plain = AutoModelForImageTextToText.from_pretrained("out")
for under, model in (("full", plain), ("final", model)):
    for row in cell.predictions("vqa", under=under)["predictions"]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec({QUESTION!r}.replace("shapes/7.png", row["images"][0]))
        assert printed.getvalue().strip() == row["answer"].strip(), (under, row, printed.getvalue())
exec({QUESTION!r})
assert inputs["input_ids"][0].tolist() == encoder.encode_prompt(rows[7]).input_ids.tolist()
"""
THEN = {"own-data": SAME_ANSWERS}
LONG = ("own-data", "own-compressor", "own-data-kind", "own-evaluation", "lora")  # one to three minutes each
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if any(block.language in ("console", "python") for block in blocks(path))
)


def test_every_tutorial_is_run():
    assert {*(DOCS / "tutorials").glob("*.md")} <= {*PAGES}


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in LONG else ()) for page in PAGES]
)
def test_page_runs(page, tmp_path):
    run_page(page, tmp_path, THEN.get(page.stem, ""))


def test_a_file_that_a_page_quotes_is_named_beside_it():
    quoted = [(path, name) for path in PAGES for name in re.findall(r'--8<-- "([^"]+)"', path.read_text())]
    assert quoted and not [name for path, name in quoted if f"`{name}`:" not in path.read_text()]
