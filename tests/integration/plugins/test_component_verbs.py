"""`components` and `check FILE`: what components there are, and the contract kits on a plug-in file."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from program import run_anew

from orchestrator import plugin, registry

PLUGIN = '''
"""Two components of somebody else."""
from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator import plugin


class LastSpec(plugin.CompressorSpec):
    """Keeps an image's last tokens."""

    implementation: ClassVar[str] = f"{__name__}:Last"
    kind: Literal["last"] = "last"
    slack: Annotated[int, Field(ge=0, description="Tokens left out behind.")] = 0


class Last:
    def __init__(self, spec):
        self.spec = spec

    def compress(self, visual_BND, grid, context):
        import torch

        kept = self.spec.kept_tokens(grid)
        index_M = torch.arange(grid.tokens - kept, grid.tokens)
        return plugin.take(visual_BND, index_M.expand(len(visual_BND), -1), context)


class SwitchSpec(plugin.ScheduleSpec):
    """One variant up to a step, then full tokens."""

    kind: Literal["switch"] = "switch"
    compressor: str
    at: int = 10

    def variants(self):
        return (self.compressor, "full")

    def compile(self, total_steps, global_batch_size):
        if total_steps <= self.at:
            raise ValueError(f"the phase has {total_steps} steps, at is {self.at}")
        actions = ((0, self.at, self.compressor), (self.at, END, "full"))
        return plugin.StageTable(actions, "full")
'''
SCHEDULE = PLUGIN.split("class LastSpec")[0] + "class SwitchSpec" + PLUGIN.split("class SwitchSpec")[1]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN.replace("END", "total_steps"))
    return path


def test_check_runs_the_kit_of_every_component(llavolta, file):
    done = llavolta("check", str(file), "--family", "llava", "--set", "switch.compressor=heavy", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compressors last: holds\n  llava: proven" in done.stdout
    assert "schedules switch: holds\n" in done.stdout
    assert "holds: actions cover every step, equal neighbours merged" in done.stdout


def test_check_names_the_broken_promise_and_exits_with_1(llavolta, file):
    file.write_text(SCHEDULE.replace("END", "total_steps - 1"))
    done = llavolta("check", str(file), "--set", "switch.compressor=heavy", "--json", timeout=300)
    (found,) = json.loads(done.stdout)
    assert done.returncode == 1 and (found["kind"], found["sort"], found["holds"]) == ("switch", "schedules", False)
    assert found["broken"] == [
        "actions cover every step, equal neighbours merged: the actions end at step 96 of 97; the last action ends "
        "with the phase"
    ]


def test_check_says_which_values_it_needs(llavolta, file):
    file.write_text(SCHEDULE)
    done = llavolta("check", str(file), timeout=300)
    assert done.returncode == 1
    assert "schedules switch: broken\n  check_schedule: switch requires compressor; give" in done.stdout


GONE = '''"""A compressor whose implementation is not there."""
from typing import ClassVar, Literal

from orchestrator.plugin import CompressorSpec


class GoneSpec(CompressorSpec):
    """Is gone."""

    implementation: ClassVar[str] = "nowhere_at_all:Gone"
    kind: Literal["gone"] = "gone"
'''


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_check_names_an_implementation_that_cannot_be_imported(llavolta, file):
    file.write_text(GONE)
    done = llavolta("check", str(file), "--family", "llava", timeout=300)
    assert done.returncode == 1, done.stderr
    assert "compressors gone: broken\n  check_compressor: gone: its implementation `nowhere_at_all:Gone`" in done.stdout


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_check_notices_that_a_spec_loads_torch(file, tmp_path):
    file.write_text("import torch\n" + file.read_text().replace("from __future__ import annotations\n", ""))
    options = ["--family", "llava", "--set", "switch.compressor=heavy"]
    done = run_anew(["check", file, *options], tmp_path)
    assert done.returncode == 1 and "importing the file loads torch" in done.stdout


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "is not a file"),
        ("x = 1\n", [], "defines no component"),
        ("x = \n", [], "cannot be imported: SyntaxError"),
        (PLUGIN, ["--set", "swich.compressor=heavy"], "defines no swich; it defines last, switch"),
        (PLUGIN, ["--set", "switch=heavy"], "write KIND.FIELD=VALUE"),
        (PLUGIN, ["--family", "lava"], "no family lava"),
    ],
)
def test_a_wrong_file_or_call_exits_with_2(llavolta, file, text, arguments, message):
    file.unlink() if text is None else file.write_text(text)
    done = llavolta("check", str(file), *arguments, timeout=300)
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stdout + done.stderr


def test_components_lists_every_sort(llavolta, built_in_only):
    documents = json.loads(llavolta("components", "--json").stdout)
    for sort, group in registry.SORTS.items():
        assert [one["kind"] for one in documents if one["sort"] == sort] == [*registry.kinds(group)]
    (pool,) = (one for one in documents if one["kind"] == "average_pool")
    assert pool["fields"]["layer"] == {**pool["fields"]["layer"], "required": True, "default": None}
    assert pool["fields"]["positions"]["type"] == "mean | first | renumber"
    assert pool["fields"]["size_bias"]["default"] is False and pool["points"] == ["decoder", "projector", "tower"]


def test_components_of_one_kind_or_sort_and_of_plugins(llavolta, file, tmp_path, tiny_text):
    assert llavolta("components", "schedules").stdout.startswith("schedules\n  constant: One variant")
    one = llavolta("components", "last", "--plugin", str(file)).stdout
    assert one.startswith("compressors\n  last: Keeps an image's last tokens.\n")
    assert "      slack: integer (default 0)  Tokens left out behind.\n" in one
    (tmp_path / "mine.yaml").write_text(tiny_text + "\nplugins: [mine.py]\n")
    assert "last" in llavolta("components", "last", "--spec", str(tmp_path / "mine.yaml")).stdout
    wrong = llavolta("components", "averag_pool")
    assert wrong.returncode == 2 and "did you mean average_pool?" in wrong.stderr


def test_listing_components_loads_no_torch(tmp_path):
    done = run_anew(["components", "ramp"], tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert (
        " pydantic\n" in done.stderr and " torch\n" not in done.stderr and done.stdout.startswith("schedules\n  ramp")
    )


def test_a_kit_takes_a_plugin_file(file, built_in_only):
    assert plugin.check_compressor(str(file), ["llava"]).proven == ("llava",)
    with pytest.raises(plugin.UsageError, match=r"defines 0 components of orchestrator\.data, not one"):
        plugin.check_data(file)
