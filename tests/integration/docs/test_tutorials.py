"""The pages are run: every command and file of a tutorial works as it stands."""

from __future__ import annotations

import pytest
from pages import ROOT, blocks, run_page

DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if any(block.language in ("console", "python") for block in blocks(path))
)


def test_every_tutorial_is_run():
    assert {*(DOCS / "tutorials").glob("*.md")} <= {*PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, tmp_path):
    run_page(page, tmp_path)
