"""What must not move when code does: ids, `plan --json`, file names of a storage, names in MLflow.

    python tests/golden/golden.py --write     # after a change that is meant to move them

Everything is read through the program and from the files it leaves, so that no name in the code can hide a change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PLAN, RUN = HERE / "plan.json", HERE / "run.json"


def program(storage: Path, *arguments: str) -> str:
    """What the program prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "LLAVOLTA"))}
    environment |= {"LLAVOLTA_STORAGE": str(storage), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=HERE, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def planned(storage: Path) -> dict[str, Any]:
    """The whole of `plan --json`; paths relative to the repository, names made of a path left out."""
    text = program(storage, "plan", "grid.yaml", "--json").replace(str(ROOT), "ROOT")
    text = re.sub(r"start_from=spec=[^\"]*", "start_from", text)
    found: dict[str, Any] = json.loads(text)
    return found


def ran(storage: Path) -> dict[str, Any]:
    """A storage after a grid and a search: names of files, digests of jobs; and the names that MLflow has."""
    program(storage, "run", "run.yaml", "--local")
    program(storage, "search", "search.yaml")
    return {"files": _files(storage), "jobs": _jobs(storage), "mlflow": _mlflow(storage / "mlflow.db")}


def _files(storage: Path) -> dict[str, list[str]]:
    """Files by the folder of what they belong to; what is named by chance, a path or a process left out."""
    found: dict[str, set[str]] = {}
    for path in storage.rglob("*"):
        name = str(path.relative_to(storage))
        if path.is_dir() or name.startswith(("cache", "leases", "mlflow", "ray", "tune", "work")):
            continue
        name = re.sub("start_from=spec=[^/]*", "start_from", name)
        name = re.sub(r"(experiments/.*)-[0-9a-f]{12}\.json", r"\1.json", name)
        place = re.match(r"([^/]+(?:/[0-9a-f]{64}|/[0-9a-f]{16})?)/?(.*)", name)
        assert place is not None
        found.setdefault(place[1], set()).add(place[2] or ".")
    return {place: sorted(names) for place, names in sorted(found.items())}


def _jobs(storage: Path) -> dict[str, str]:
    """Digest of each job as it was written, paths relative to the repository."""
    found = {}
    for path in sorted(storage.glob("stage_runs/*/job.json")):
        text = path.read_text().replace(str(ROOT), "ROOT").replace(str(storage), "STORAGE")
        found[path.parent.name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def _mlflow(file: Path) -> dict[str, Any]:
    """Names of params, tags and metrics with the number of runs that have them; values of what the file decides."""
    with closing(sqlite3.connect(file)) as opened:

        def count(table: str) -> dict[str, int]:
            rows = opened.execute(f"SELECT DISTINCT run_uuid, key FROM {table}").fetchall()
            return dict(sorted(Counter(key for _, key in rows).items()))

        params = opened.execute("SELECT key, value FROM params").fetchall()
        ids = opened.execute("SELECT value FROM tags WHERE key = 'cell_id'").fetchall()
        tables = ("params", "tags", "latest_metrics")
        return {
            **{table: count(table) for table in tables},
            "values": {key: sorted({value.replace(str(ROOT), "ROOT") for k, value in params if k == key})
                       for key in sorted({key for key, _ in params})},
            "cell_ids": sorted(value for (value,) in ids),
        }  # fmt: skip


def main() -> None:
    """Compares, or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write what is found as what must be")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        for file, find in ((PLAN, planned), (RUN, ran)):
            found = json.dumps(find(Path(folder) / file.stem), indent=1) + "\n"
            if write:
                file.write_text(found)
            elif found != file.read_text():
                raise SystemExit(f"{file} is not what is found now")


if __name__ == "__main__":
    main()
