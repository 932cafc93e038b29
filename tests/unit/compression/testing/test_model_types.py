"""The table of all image-text-to-text types says what the self-check finds; a fast part of it is checked anew."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

TABLE = runpy.run_path(str(Path(__file__).parents[3] / "model_types.py"))
KNOWN = json.loads(TABLE["RESULTS"].read_text())


def test_every_type_of_transformers_is_in_the_table():
    assert set(TABLE["types"]()) <= set(KNOWN)
    assert TABLE["table"](KNOWN) in TABLE["PAGE"].read_text()


def test_no_type_is_served_that_lacks_a_required_proof():
    from orchestrator.compression.testing.self_check import REQUIRED

    for name, found in KNOWN.items():
        if not found.keys() & {"adapter", "refused", "not_built"}:
            assert {found[one] for one in REQUIRED} == {"proven"}, name


@pytest.mark.parametrize("name", ["lfm2_vl", "cosmos3_edge", "glm4v_moe", "idefics2", "cosmos3_omni", "glm5_next"])
def test_a_type_shows_what_the_table_says(name):
    found = TABLE["check"](name)
    told = KNOWN[name]
    assert found.keys() == told.keys()
    assert {key: value == "proven" for key, value in found.items()} == {
        key: value == "proven" for key, value in told.items()
    }
