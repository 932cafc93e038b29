"""What the report of 504 cells costs: to write, in size, and to open.

    python tests/bench_report.py

Seconds are of CPU: of this process, and of the browser's main thread.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
from browser import browser
from conftest import TINY_EXPERIMENT
from ledger_work import finish

import orchestrator as llv
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.jobs import EvaluationJob

RATES = [1e-4 * (1 + number / 10) for number in range(84)]


def write_finished(folder: Path) -> Path:
    """504 cells, all done; each answers some of 40 questions right."""
    axes = f"[full, heavy, two_stage]\n  phases.finetune.learning_rate: {RATES}\n  seed: [0, 1]"
    file = folder / "big.yaml"
    file.write_text(TINY_EXPERIMENT.replace("[full, heavy, two_stage]", axes))
    plan = prepare(file)
    for number, job in enumerate(plan.tree.work(plan.ledger)):
        if isinstance(job, EvaluationJob):
            right = number % 40
            said = [{"row": i, "images": [f"{i // 2}.png"], "right": i < right} for i in range(40)]
            result = {"metrics": {"accuracy": right / 40}, "seconds": 1.0, "num_samples": 40}
            plan.ledger.write_evaluation(job.id, result, said)
        else:
            finish(plan.ledger, job, checkpoint=False)
    return file


def main() -> None:
    """Print the three figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LLAVOLTA_STORAGE"] = str(folder / "runs")
        experiment, page = llv.load(write_finished(folder)), folder / "report.html"
        started = time.process_time()
        page.write_text(experiment.report().to_html())
        print(f"{len(experiment.cells)} cells: {time.process_time() - started:.1f} s of CPU to write it")
        print(f"{page.stat().st_size / 1e6:.1f} MB")
        with browser() as opened:
            opened.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            opened.get(page.as_uri())
            found = opened.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        seconds = {each["name"]: each["value"] for each in found}
        print(f"{seconds['TaskDuration']:.1f} s of CPU to open it")


if __name__ == "__main__":
    main()
