"""The pages are run: every command and file of a tutorial works as it stands."""

from __future__ import annotations

import pytest
from pages import ROOT, blocks, run_page

DOCS = ROOT / "docs"
RUN = sorted(path for path in DOCS.rglob("*.md") if any(block.language == "console" for block in blocks(path)))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", sorted({*RUN, *TUTORIALS}), ids=lambda page: page.stem)
def test_page_runs(page, tmp_path):
    run_page(page, tmp_path)
