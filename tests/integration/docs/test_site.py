"""The docs site builds strictly and without the network; what its pages and the code cite is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from repository import ROOT

pytest.importorskip("mkdocs")

PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = "orchestrator|plugins|experiments|tests|docker|docs|examples"
# A file of this repository as prose names it: `tests/bench_tree.py`, docs/concepts/cost.md, `.ci/run`.
CITED = re.compile(rf"(?<![\w/.$])((?:(?:{FOLDERS})/[\w./-]*\w|\.ci/run|Makefile|constraints\.txt|pyproject\.toml))")
MADE_BY_USERS = {"experiments/llava15_7b/data", "docker/.env"}  # what their own READMEs tell a user to put there


class Page(HTMLParser):
    """The links, anchors and loaded files of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.loads: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.loads.add(found["src"])
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.add(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(found) > 10
    return found


def test_links_and_anchors_lead_somewhere(site, pages):
    lost = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                lost.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                lost.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    assert not lost, "\n".join(lost)


def test_nothing_is_fetched_from_elsewhere(pages):
    fetched = {load for page in pages.values() for load in page.loads if urlsplit(load).scheme or load.startswith("//")}
    assert not {load for load in fetched if not load.startswith("data:")}


def test_pages_cite_files_that_are_there():
    lost = []
    for page in PAGES:
        for name in CITED.findall(page.read_text()):
            name = name.rstrip(".")
            if not (ROOT / name).exists() and not name.startswith(tuple(MADE_BY_USERS)):
                lost.append(f"{page.relative_to(ROOT)}: {name}")
    assert not lost, "\n".join(lost)


def test_the_code_cites_pages_that_are_there():
    files = [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "plugins").rglob("*.py"), ROOT / "pyproject.toml"]
    cited = {(file, name) for file in files for name in re.findall(r"\bdocs/[\w/.-]*\w", file.read_text())}
    assert cited
    lost = [f"{file.relative_to(ROOT)}: {name}" for file, name in sorted(cited) if not (ROOT / name).exists()]
    assert not lost, "\n".join(lost)


def test_the_architecture_names_every_folder_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.name for path in (ROOT / "orchestrator").iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(re.findall(r"^  (\w+)/", text, re.MULTILINE))


def test_the_architecture_is_the_import_contract():
    text = (ROOT / "docs" / "architecture.md").read_text()
    contract = (ROOT / "pyproject.toml").read_text().partition('type = "layers"')[2].partition("]")[0]
    layers = [re.findall(r"orchestrator\.(\w+)", line) for line in contract.splitlines() if "orchestrator." in line]
    order = {name: place for place, names in enumerate(layers) for name in names}
    listed = re.findall(r"^  (\w+)(?:/|\.py) ", text, re.MULTILINE)
    assert sorted(listed) == sorted(order)
    assert [order[name] for name in listed] == sorted(order.values())


def test_the_walk_is_in_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text()
    hops = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (`\w+`|the package itself) \|", text, re.MULTILINE)
    assert len(hops) > 10
    for names, folder in hops:
        where = ROOT / "orchestrator" / ("" if "package" in folder else folder.strip("`"))
        files = where.glob("*.py") if "package" in folder else where.rglob("*.py")
        code = "\n".join(file.read_text() for file in files)
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def|class) {name}\b", code, re.MULTILINE), f"{name} is not in {where}"
