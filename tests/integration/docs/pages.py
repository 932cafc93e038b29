"""Runs a page of the docs: its files are written, its commands run, its Python run; what it shows must come out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from program import run_forked
from repository import ROOT

_FENCE = re.compile(r"^```([\w-]*) *(?:title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, the file it is, its text."""

    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(language, title or None, text) for language, title, text in _FENCE.findall(page.read_text())]


def run_page(page: Path, folder: Path, then: str = "") -> None:
    """Do what a reader of the page would do, at the root of a checkout that holds nothing but the experiments.

    A block with a title is a file. A `console` block holds commands (`$ llavolta ...`, `$ python ...`) and what they
    print; `...` stands for what is left out, scores and times that machines differ in, or for lines; `# exit code N`
    behind a command is what it returns. The Python blocks without a title are one program, `then` is its end.
    """
    (folder / "experiments").symlink_to(ROOT / "experiments")
    program = []
    for block in blocks(page):
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "console":
            run_console(block.text, folder)
        elif block.language == "python":
            program.append(block.text)
    if program:
        done = run_forked(["-c", "\n".join([*program, then])], folder, program="python", merged=True)
        assert done.returncode == 0, done.stdout


def run_console(text: str, folder: Path) -> None:
    """Run the commands of a `console` block and compare what they print."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not parts[0].strip(), "a console block begins with a command"
    for part in parts[1:]:
        command, _, shown = part.partition("\n")
        command, _, remark = command.partition("#")
        code = re.search(r"exit code (\d+)", remark)
        program, *words = shlex.split(command)
        done = run_forked(words, folder, program=program, merged=True)
        assert done.returncode == int(code[1] if code else 0), f"$ {command}\n{done.stdout}"
        told = f"$ {command}\nprinted\n{done.stdout}\nwhich does not match\n{shown}"
        assert _pattern(shown).fullmatch(done.stdout.strip() + "\n"), told


def _pattern(shown: str) -> re.Pattern[str]:
    """What the printed text must match: blanks count as one."""
    shown = shown.strip()
    if not shown:
        return re.compile(".*", re.DOTALL)  # nothing is shown of it
    lines = []
    for line in shown.splitlines():
        text = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*").replace(r"\ ", r"\s+")
        lines.append(r"(?:.*\n)*?" if line.strip() == "..." else r"\s*" + text + r"\s*?\n")
    return re.compile("".join(lines))
