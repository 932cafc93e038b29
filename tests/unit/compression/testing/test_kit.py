"""Every compressor on every model family, proven by the contract kit; docs/reference/models.md says the same."""

from __future__ import annotations

import re

import pytest
import torch
from repository import ROOT

from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.__main__ import (
    built_in_methods,
    markdown,
    read_marks,
    run_cell,
    write,
)
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.kit import bench_of
from orchestrator.errors import UsageError

MODELS = ROOT / "docs" / "reference" / "models.md"
METHODS = built_in_methods()
# In `make test`: every method on one family, and every family with one method.
QUICK_FAMILY, QUICK_METHOD = "llava", "average_pool"
CELLS = [
    pytest.param(
        method,
        family,
        marks=() if family == QUICK_FAMILY or method == QUICK_METHOD else pytest.mark.slow,
        id=f"{method}-{family}",
    )
    for family in TINY
    for method in METHODS
]


@pytest.mark.parametrize(("method", "family"), CELLS)
def test_cell(method, family):
    result = run_cell(method, family)
    assert not result.startswith("failed"), result
    assert (result == "proven") == read_marks(MODELS.read_text())[method][family], result


def test_the_docs_list_the_registered_methods_and_families():
    marks = read_marks(MODELS.read_text())
    assert sorted(marks) == sorted(METHODS)
    assert all(list(row) == list(TINY) for row in marks.values())


def test_the_docs_say_what_each_method_was_compared_with():
    lines = (ROOT / "docs" / "concepts" / "compressors.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][-1] == "compared with" and all(len(row) == 5 and all(row) for row in rows)
    named = [kind for row in rows[2:] for kind in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(METHODS)


def test_the_quick_cells_are_real_ones():
    assert QUICK_FAMILY in TINY and QUICK_METHOD in METHODS


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", TINY)
def test_without_a_point_the_plain_computation_is_the_plain_model(family, padding):
    """What all cells are held against is right itself."""
    bench = bench_of(family)
    for other in (False, True):
        batch = bench.batch(bench.rows(other), padding)
        with torch.no_grad():
            expected = bench.model("plain")(**batch.inputs).loss
            assert torch.allclose(bench.reference().loss(batch.inputs, batch.units, []), expected, atol=1e-5)


def test_several_points_down_the_depth():
    drop = {"kind": "pyramid_drop", "keep_ratio": "1/2"}
    assert check_compressor([drop, drop, drop], ["llava"]).proven == ("llava",)
    pool = {"kind": "average_pool", "stride": 2}
    report = check_compressor([{**pool, "layer": 0}, {**pool, "layer": 0}, {**pool, "layer": 3}], ["llava"])
    assert report.proven == ("llava",)


@pytest.mark.parametrize("positions", ["mean", "first", "renumber"])
def test_parameters_of_a_method_are_kept(positions):
    assert check_compressor({"kind": "average_pool", "positions": positions, "keep_tokens": 4}, ["llava"]).proven


def test_a_report_names_who_refuses_and_why():
    report = check_compressor({"kind": "visionzip"}, ["llava", "internvl"] if "internvl" in TINY else ["llava"])
    assert "llava" in report.proven
    assert str(report).startswith("llava: proven")


def test_nothing_proven_is_a_failure():
    with pytest.raises(AssertionError, match="nothing is proven"):
        check_compressor({"kind": "fastv", "layer": 0}, ["llava"])


@pytest.mark.parametrize(
    ("point", "families", "told"),
    [
        ({"kind": "average_pol"}, None, "average_pool"),
        ({"kind": "average_pool"}, ["lava"], "no family lava"),
    ],
)
def test_wrong_calls(point, families, told):
    with pytest.raises(UsageError, match=told):
        check_compressor(point, families)


def test_the_table_is_written_between_its_markers(tmp_path):
    cells = {"one": {"a": "proven", "b": "refused: no CLS"}, "two": {"a": "refused: no CLS", "b": "failed: 3"}}
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- compressors x families -->\nold\n<!-- end of compressors x families -->\nafter\n")
    write(file, cells)
    text = file.read_text()
    assert markdown(cells) in text and "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| `one` | ✓ | – (1) |" in text and "1. no CLS" in text and "**failed**" in text
    assert read_marks(text) == {"one": {"a": True, "b": False}, "two": {"a": False, "b": False}}
