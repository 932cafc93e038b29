"""The rehearsal: passes what works, stops what does not before the first step, and changes no number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PLUGIN = """
from typing import Any, ClassVar, Literal
from orchestrator.spec.components import CompressorSpec

class FaultySpec(CompressorSpec):
    implementation: ClassVar[str] = f"{__name__}:Faulty"
    kind: Literal["faulty"] = "faulty"
    most: int = 0

class Faulty:
    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def compress(self, visual_BND: Any, grid: Any, context: Any) -> Any:
        import torch
        from orchestrator.compression import take
        if len(visual_BND) > self.spec.most:
            if self.spec.most:
                raise torch.OutOfMemoryError("Tried to allocate 40.00 GiB")
            raise ZeroDivisionError("a fault of the method")
        index_M = torch.arange(0, grid.tokens, self.spec.stride)
        return take(visual_BND, index_M.expand(len(visual_BND), -1), context)
"""


@pytest.fixture
def faulty(tmp_path: Path, tiny_text: str) -> Path:
    """Two cells: `heavy` all along, and one whose last of three stages is under a method that does not work."""
    (tmp_path / "faulty.py").write_text(PLUGIN)
    text = tiny_text.replace("  heavy:", "  faulty: {kind: faulty, layer: 2, stride: 2}\n  heavy:")
    text = text.replace(
        "stages: [{share: 1/2, compressor: heavy}, {}]",
        "stages: [{share: 1/3}, {share: 1/3, compressor: heavy}, {compressor: faulty}]",
    ).replace("[full, heavy, two_stage]", "[heavy, two_stage]")
    path = tmp_path / "mine.yaml"
    path.write_text(text + "plugins: [faulty.py]\ncluster: {rehearse: true}\n")
    return path


def variants_trained(folder: Path) -> set[str]:
    """Variants of every step that was trained to a state or is in a spool."""
    found = set()
    for path in (folder / "runs").glob("*/*/metrics.jsonl"):
        found |= {json.loads(line)["variant"] for line in path.read_text().splitlines()}
    return found


def weights_of(folder: Path) -> dict[str, bytes]:
    cells = folder / "runs" / "cells" / "tiny"
    return {path.parts[-3]: path.read_bytes() for path in sorted(cells.glob("*/weights/model.safetensors"))}


@pytest.mark.slow
def test_a_good_spec_passes_once_leaves_only_notes_and_trains_to_the_same_bits(llavolta, tmp_path, tiny_experiment):
    plain = llavolta("run", tiny_experiment, "--local", LLAVOLTA_STORAGE=str(tmp_path / "plain" / "runs"))
    assert plain.returncode == 0 and "rehearse" not in plain.stdout, plain.stderr
    first = ["--local", "--set", "cluster.rehearse=true"]
    done = llavolta("run", tiny_experiment, *first, "--set", "matrix={phases.finetune.schedule: [full, heavy]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearse finetune under full+heavy" in done.stdout
    notes = {path: path.read_bytes() for path in (tmp_path / "runs" / "rehearsals").rglob("*.json")}
    assert notes and all(json.loads(note)["error"] is None for note in notes.values())
    assert not any((tmp_path / "runs" / "work").glob("*"))
    # The third cell does what has been tried: no engine is opened for it again.
    done = llavolta("run", tiny_experiment, *first)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "runs" / "rehearsals").rglob("*.json")} == notes
    assert not any((tmp_path / "runs" / "work").glob("*"))
    assert weights_of(tmp_path) == weights_of(tmp_path / "plain") and len(weights_of(tmp_path)) == 3


@pytest.mark.slow
def test_a_method_that_fails_in_the_last_stage_fails_its_cell_before_anything_is_trained(llavolta, tmp_path, faulty):
    done = llavolta("run", faulty, "--local")
    assert done.returncode == 1, done.stdout + done.stderr
    told = "the rehearsal of finetune under faulty failed with ZeroDivisionError: a fault of the method"
    assert told in done.stdout and "Traceback" not in done.stdout
    table = json.loads(llavolta("table", faulty, "--json").stdout)
    assert {row["name"]: row["status"] for row in table["rows"]} == {
        "schedule=heavy": "finished", "schedule=two_stage": "failed",
    }  # fmt: skip
    assert variants_trained(tmp_path) == {"heavy"}  # not one step of the other cell, which begins on full tokens
    # Mended, it is taken up again.
    faulty.write_text(faulty.read_text().replace("stride: 2}\n  heavy", "stride: 2, most: 100}\n  heavy"))
    again = llavolta("run", faulty, "--local", "--retry-failed")
    assert again.returncode == 0, again.stdout + again.stderr
    assert variants_trained(tmp_path) == {"full", "heavy", "faulty"}


@pytest.mark.slow
def test_out_of_memory_names_a_smaller_micro_batch_that_then_passes(llavolta, tmp_path, faulty):
    faulty.write_text(faulty.read_text().replace("stride: 2}\n  heavy", "stride: 2, most: 4}\n  heavy"))
    done = llavolta("run", faulty, "--local")
    assert done.returncode == 1, done.stdout + done.stderr
    told = "under faulty out of memory in micro-batches of 8; by the estimate per_device_train_batch_size: 4 fits"
    assert told in done.stdout and variants_trained(tmp_path) == {"heavy"}
    options = ["--retry-failed", "--set", "phases.finetune.per_device_train_batch_size=4"]
    options += ["--set", "evaluate.vqa.batch_size=4"]
    again = llavolta("run", faulty, "--local", *options)
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.slow
def test_a_real_limit_on_memory_is_met_by_the_rehearsal(llavolta, tmp_path, faulty):
    # Far more than any machine has is asked for by torch itself.
    (tmp_path / "faulty.py").write_text(
        PLUGIN.replace('raise ZeroDivisionError("a fault of the method")', "torch.empty(2**50)")
    )
    done = llavolta("run", faulty, "--local")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "under faulty out of memory in micro-batches of 8" in done.stdout
    assert variants_trained(tmp_path) == {"heavy"}


@pytest.mark.slow
def test_two_workers_under_zero3_rehearse_learned_compressors_and_evaluations(llavolta, tmp_path, tiny_text):
    text = tiny_text.replace("  heavy:", "  learned: {kind: q_former, layer: projector, keep_tokens: 16}\n  heavy:")
    text = text.replace("[full, heavy, two_stage]", "[learned, two_stage]").replace("zero0", "zero3")
    text = text.replace("train: [vision_tower,", "train: [compressor, vision_tower,")
    (tmp_path / "mine.yaml").write_text(text + "cluster: {rehearse: true, num_workers: 2}\n")
    done = llavolta("run", "mine.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    notes = list((tmp_path / "runs" / "rehearsals").rglob("*.json"))
    assert notes and all(json.loads(path.read_text())["error"] is None for path in notes)
    left = {path.name for path in (tmp_path / "runs" / "work").rglob("*") if path.is_file()}
    assert left <= {"log.txt", "log_rank1.txt"}  # what evaluations printed
