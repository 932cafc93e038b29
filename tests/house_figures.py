"""Counts the house: files, lines, importers, late imports, circles, and the files that three walks pass.

    python tests/house_figures.py [--root OTHER_CHECKOUT]

A *single-importer file* is imported by exactly one other file of ours; entry points (plug-ins) and `__init__` do not
count. A *late import* stands inside a function. A *circle* is a strongly connected group of modules, imports for type
checkers and late ones included. A *walk* lists by hand the files that one value passes; each must name it.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = {"orchestrator": "orchestrator", "plugins": "orchestrator_plugins"}
WALKS = {
    "a stage's share, from the file to the model": """
        orchestrator/spec/loader.py load_experiment
        orchestrator/spec/components.py StageTable
        plugins/schedules/stages.py share
        orchestrator/plan/cells/expand.py resolve_schedule
        orchestrator/plan/cells/compiled_schedule.py CompiledSchedule
        orchestrator/plan/cells/cell.py CompiledSchedule
        orchestrator/plan/tree.py schedule
        orchestrator/plan/jobs.py table
        orchestrator/dispatch/worker.py do_job
        orchestrator/dispatch/run_job.py train_stage
        orchestrator/training/stage_run.py action_at
        orchestrator/training/engine.py switch""",
    "a loss, from the step to MLflow": """
        orchestrator/training/step.py loss
        orchestrator/training/stage_run.py loss
        orchestrator/training/metrics_log.py loss
        orchestrator/plan/step_history.py train/loss
        orchestrator/plan/cell_record.py StepHistory
        orchestrator/plan/experiment_plan.py CellRecord
        orchestrator/run.py recorder.put
        orchestrator/tracking/mlflow_tracker.py log_some""",
    "where a stage's steps are decided": """
        orchestrator/spec/phase.py max_steps
        plugins/schedules/stages.py share
        orchestrator/spec/components.py StageTable
        orchestrator/plan/cells/expand.py max_steps
        orchestrator/plan/cells/compiled_schedule.py last_step""",
}


class Import(NamedTuple):
    """One import of a module of ours."""

    importer: str
    imported: str
    line: int
    late: bool


def modules(root: Path) -> dict[str, Path]:
    """Dotted name to file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """What a file imports of ours, wherever it stands."""

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                targets = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                targets = [each if each in known else child.module for each in names]
            else:
                targets = []
            for target in dict.fromkeys(targets):
                if target in known and target != name:
                    yield Import(name, target, child.lineno, late)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, late or inside)

    yield from visit(ast.parse(path.read_text()), False)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for child in edges.get(node, ()):
            if child not in index:
                visit(child)
                low[node] = min(low[node], low[child])
            elif child in stack:
                low[node] = min(low[node], index[child])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def _names(file: Path, word: str) -> bool:
    return file.is_file() and word in file.read_text()


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--list", action="store_true", help="name the files and imports that are counted")
    options = parser.parse_args()
    known = modules(options.root)
    found = [each for name, path in known.items() for each in imports(name, path, known)]
    importers: dict[str, set[str]] = {name: set() for name in known}
    edges: dict[str, set[str]] = {name: set() for name in known}
    for each in found:
        importers[each.imported].add(each.importer)
        edges[each.importer].add(each.imported)
    single = [
        name
        for name, path in known.items()
        if len(importers[name]) == 1 and path.name != "__init__.py" and name.startswith("orchestrator.")
    ]
    late = [each for each in found if each.late]
    lines = {folder: sum(len(path.read_text().splitlines()) for name, path in known.items() if name.split(".")[0] == p)
             for folder, p in PACKAGES.items()}  # fmt: skip
    groups = circles(edges)
    print(f"files                       {len(known)}")
    print(f"lines                       {sum(lines.values()):,} ({', '.join(f'{k} {v:,}' for k, v in lines.items())})")
    print(f"single-importer files       {len(single)}")
    print(f"late imports of our own     {len(late)}")
    print(f"circles                     {len(groups)}")
    for walk, text in WALKS.items():
        stops = [line.split() for line in text.strip().splitlines()]
        lost = [f"{file}: {word}" for file, word in stops if not _names(options.root / file, word)]
        print(f"walk                        {f'lost at {lost}' if lost else len(stops)} ({walk})")
    if options.list:
        for name in single:
            print(f"single  {name} <- {next(iter(importers[name]))}")
        for each in late:
            print(f"late    {each.importer}:{each.line} {each.imported}")
        for group in groups:
            print("circle  " + " ".join(group))


if __name__ == "__main__":
    main()
