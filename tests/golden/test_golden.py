"""What must not move when code does, against files written before (`python tests/golden/golden.py --write`)."""

import json

import golden
import pytest


@pytest.mark.parametrize(("file", "find"), [(golden.PLAN, golden.planned), (golden.RUN, golden.ran)])
def test_nothing_moved(file, find, tmp_path):
    found = json.loads(json.dumps(find(tmp_path / "storage")))
    expected = json.loads(file.read_text())
    for name in expected.keys() | found.keys():
        assert found.get(name) == expected.get(name), name
