"""The names that plug-ins outside this repository rely on: adding one is deliberate, changing one is a new version."""

from __future__ import annotations

import dataclasses
import inspect
import sys

import pytest
from repository import ROOT

import orchestrator.compression as compression
import orchestrator.compression.testing as testing
from orchestrator import registry
from orchestrator.spec.components import CompressorSpec, Grid, ScheduleSpec, StageTable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def names_of(cls, base=object):
    """Public attributes, methods and fields that a class has beyond those of `base`."""
    fields = set(getattr(cls, "model_fields", {})) | {name for name in dir(cls) if not name.startswith(("_", "model_"))}
    return sorted(fields - set(dir(base)) - set(getattr(base, "model_fields", {})))


def parameters(function):
    return list(inspect.signature(function).parameters)


def fields(cls):
    return [field.name for field in dataclasses.fields(cls)]


FROZEN = {
    "orchestrator.compression": (
        lambda: sorted(compression.__all__),
        ["ALL_LEARNED_POINTS", "Attachment", "Compressor", "Context", "Kept", "attach", "attachment_of", "take"],
    ),
    "orchestrator.compression.testing": (
        lambda: sorted(testing.__all__),
        ["Report", "TinyFamily", "check_compressor", "pad_rows"],
    ),
    "attach": (lambda: parameters(compression.attach), ["model", "points", "modules", "seed"]),
    "attachment_of": (lambda: parameters(compression.attachment_of), ["model"]),
    "take": (lambda: parameters(compression.take), ["visual_BND", "index_BM", "context", "counts_B"]),
    "check_compressor": (lambda: parameters(testing.check_compressor), ["points", "families"]),
    "Report": (lambda: names_of(testing.Report) + fields(testing.Report), ["lines", "proven", "refused", "families"]),
    "Context": (
        lambda: fields(compression.Context),
        [
            "layer",
            "positions_ABN",
            "sizes_BN",
            "rows_B",
            "seed",
            "step",
            "sample_indices",
            "hidden_RND",
            "module",
            "columns_BN",
            "text_RN",
            "attention_BN",
            "row_keys_RND",
            "cls_attention_BN",
            "cls_keys_BND",
            "tower_keys_BND",
        ],
    ),
    "Kept": (
        lambda: fields(compression.Kept),
        [
            *("hidden_BMD", "positions_ABM", "sizes_BM", "sources_BM", "grid"),
            *("renumber", "size_bias", "before", "in_place", "counts_B"),
        ],
    ),
    "Grid": (lambda: fields(Grid), ["height", "width", "frames", "frame"]),
    "StageTable": (lambda: fields(StageTable)[:2], ["actions", "final"]),
    "TinyFamily": (
        lambda: fields(testing.TinyFamily),
        ["model_type", "build", "batch", "units", "layers", "first_layer", "attentions"],
    ),
    "entry-point groups": (
        lambda: sorted(value for name, value in vars(registry).items() if name.isupper() and isinstance(value, str)),
        [
            *("orchestrator.compressors", "orchestrator.data", "orchestrator.evaluations", "orchestrator.schedules"),
            "orchestrator.trackers",
        ],
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_names_are_as_published(name):
    found, frozen = FROZEN[name]
    assert found() == frozen


def test_what_a_compressor_spec_has():
    from orchestrator.spec.base import Component

    assert names_of(CompressorSpec, Component) == [
        "across_frames",
        "adaptive",
        "enters_late",
        "keep_ratio",
        "keep_tokens",
        "keeps_all",
        "keeps_none",
        "kept_grid",
        "kept_tokens",
        "keys_only",
        "layer",
        "layer_average_tokens",
        "layer_index",
        "learns",
        "module_name",
        "module_operations",
        "module_shape",
        "nearest_amount",
        "needs",
        "place",
        "points",
        "resolved_layer",
        "sort_key",
        "stride",
        "takes_amount",
        "tokens_before",
        "tower_index",
    ]


def test_what_a_schedule_spec_has():
    from orchestrator.spec.base import Component

    published = {"variants", "compile"}
    assert published <= set(names_of(ScheduleSpec, Component))


def test_what_an_attachment_has():
    published = {
        "detach",
        "last_visual_layer_tokens",
        "model",
        "points",
        "set_step",
        "switch",
        "visual_tokens_per_layer",
    }
    source = inspect.getsource(compression.Attachment)
    assert published - {"model", "visual_tokens_per_layer"} <= set(names_of(compression.Attachment))
    assert all(f"self.{name}" in source for name in ("model", "visual_tokens_per_layer"))
    assert parameters(compression.Attachment.switch) == ["self", "points"]
    assert parameters(compression.Attachment.set_step) == ["self", "step", "seed", "sample_index"]


def test_every_published_group_has_a_plugin_of_ours():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(FROZEN["entry-point groups"][1]) <= set(groups)
