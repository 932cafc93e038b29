"""Measures `plan` and `validate` on 10,000 cells: 625 distinct four-stage schedules x 16 seeds, five x 2,000 seeds.

    python tests/bench_plan.py --rounds 3

The commands run as a user starts them, each in a process of its own on an empty ledger. Told are the least seconds of
processor time (which other work on the machine hardly moves) and by the clock, the peak of memory, and a digest of what
was printed, by which two versions of the code are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

QUICKSTART = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
COMMANDS = (("validate",), ("plan",), ("plan", "--json"))
COMPRESSORS = {
    "heavy": {"kind": "average_pool", "layer": 1, "stride": 8},
    "middle": {"kind": "average_pool", "layer": 1, "stride": 4},
    "wide": {"kind": "average_pool", "layer": 1, "stride": 2},
    "light": {"kind": "average_pool", "layer": "50%", "stride": 2},
}
VARIANTS = (*COMPRESSORS, "full")


class Figures(NamedTuple):
    """What one command took."""

    cpu: float
    wall: float
    peak_mib: float
    printed: str


def grid(schedules: dict[str, Any], matrix: dict[str, Any], seeds: int) -> dict[str, Any]:
    """An experiment on the quickstart's model and data."""
    return {
        "extends": str(QUICKSTART),
        "name": "planned",
        "compressors": COMPRESSORS,
        "schedules": {"four_stage": None, **schedules},
        "report": None,
        "matrix": {"phases.finetune.schedule": None, **matrix, "seed": list(range(seeds))},
    }


def four_stages(names: tuple[str, ...]) -> dict[str, Any]:
    """A schedule of four equal stages."""
    return {"kind": "stages", "stages": [{"share": "1/4", "compressor": name} for name in names]}


def grids() -> dict[str, dict[str, Any]]:
    """The experiments: an axis for each stage, the same schedules by name, and five schedules with many seeds."""
    named = {"_".join(names): four_stages(names) for names in itertools.product(VARIANTS, repeat=4)}
    five = {f"from_{name}": four_stages((name, "wide", "light", "full")) for name in VARIANTS}
    stages = {f"schedules.one.stages.{index}.compressor": list(VARIANTS) for index in range(4)}
    axes = grid({"one": four_stages(VARIANTS[:4])}, stages, 16)
    axes["phases"] = {"finetune": {"schedule": "one"}}
    return {
        "625 x 16, four axes": axes,
        "625 x 16, by name": grid(named, {"phases.finetune.schedule": list(named)}, 16),
        "5 x 2000": grid(five, {"phases.finetune.schedule": list(five)}, 2000),
    }


def run(folder: Path, command: tuple[str, ...], file: Path) -> Figures:
    """Runs the program; only its own process counts."""
    out = folder / "printed"
    arguments = [sys.executable, "-m", "orchestrator", command[0], str(file), *command[1:]]
    environment = {**os.environ, "LLAVOLTA_STORAGE": str(folder / "runs"), "XDG_CACHE_HOME": str(folder / "cache")}
    begun = time.perf_counter()
    with out.open("wb") as printed:
        to_file = [(os.POSIX_SPAWN_DUP2, printed.fileno(), 1)]
        process = os.posix_spawn(sys.executable, arguments, environment, file_actions=to_file)
        _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    wall = time.perf_counter() - begun
    digest = hashlib.sha256(out.read_bytes()).hexdigest()[:12]
    return Figures(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024, digest)


def main() -> None:
    """Prints one line for each experiment and command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="the least of so many is told")
    parser.add_argument("--keep", type=Path, help="folder in which the experiment files stay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, experiment in grids().items():
            file = (given.keep or folder) / f"{title.replace(',', '').replace(' ', '_')}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(experiment, sort_keys=False))
            for command in COMMANDS:
                found = [run(folder, command, file) for _ in range(given.rounds)]
                cpu, wall = min(each.cpu for each in found), min(each.wall for each in found)
                peak = max(each.peak_mib for each in found)
                told = f"{title:20} {' '.join(command):12} {cpu:6.2f} CPU s {wall:6.2f} s {peak:5.0f} MiB"
                print(f"{told}  {' '.join(dict.fromkeys(each.printed for each in found))}", flush=True)


if __name__ == "__main__":
    main()
