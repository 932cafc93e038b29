"""The troubleshooting page quotes messages that the program has."""

from __future__ import annotations

import ast
import re

import pytest
from repository import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^\| `([^|]+)`[^|`]*(?:`[^|`]*`[^|]*)?\|", PAGE.read_text(), re.MULTILINE)


def texts() -> str:
    """Every text in the sources, what is filled in left out, one a line."""
    found = []
    for folder in ("orchestrator", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(text.replace("\n", " ").replace("`", "") for text in found)


@pytest.fixture(scope="module")
def source() -> str:
    return texts()


def test_the_page_is_read():
    assert len(MESSAGES) > 40


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_exists(message, source):
    for part in message.split("..."):
        words = part.strip(" :;,.")
        assert len(words) < 3 or words in source, f"no message has {words!r}"
