"""lmms-eval's own evaluator on a cell trained here, on local sets in the schemas of the hub's benchmarks.

One process, since importing lmms-eval takes 13 s: what it changes in the process is put back, which is tested too.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from benchmark_hub import write_hub
from mlflow import MlflowClient
from PIL import ImageFile
from repository import ROOT
from rich.console import Console
from torch.distributed import distributed_c10d

import orchestrator as llv
from orchestrator import plugin
from orchestrator.evaluation.evaluate import evaluation_data, evaluation_mode, load_model
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.ledger import Ledger

pytest.importorskip("lmms_eval")
TASKS = ["gqa", "mme", "pope", "textvqa_val"]
PROMPT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def grid(tmp_path_factory, tiny_text):
    """A finished grid of two cells, to which the benchmarks were added afterwards: file, first table, outcome."""
    folder = tmp_path_factory.mktemp("benchmarks")
    text = tiny_text.replace("[full, heavy, two_stage]", "[full, heavy]").replace("max_steps: 6", "max_steps: 2")
    spec = yaml.safe_load(text)
    # A model that can see, so that scores are not all zero; its own steps hardly change it.
    spec["model"] = {"model_name_or_path": str(ROOT / "experiments/models/tiny-llava-trained"), "dtype": "float32"}
    spec["phases"]["finetune"]["learning_rate"] = 1e-6
    spec |= {"cluster": {"storage_path": "runs"}, "tracking": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"}}
    file = folder / "tiny.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_TOKEN", "hf_of_nobody")
        write_hub(folder)
        file.write_text(json.dumps(spec))
        before = run(file)
        spec["evaluate"]["bench"] = {"kind": "lmms_eval", "tasks": TASKS, "model_max_length": 512}
        file.write_text(json.dumps(spec))
        yield file, before, run(file)


def run(file: Path, **options):
    return llv.load(file).run(local=True, console=Console(quiet=True), **options)


def with_entry(file: Path, name: str, **entry) -> Path:
    """The experiment with one more evaluation, in a file of its own beside it."""
    spec = json.loads(file.read_text())
    spec["evaluate"][name] = {"kind": "lmms_eval", "model_max_length": 512, **entry}
    other = file.with_name(f"{name}.yaml")
    other.write_text(json.dumps(spec))
    return other


def job_of(file: Path, label: str, cell: int = 0):
    walk = prepare(file)
    return next(job for job in walk.cells[cell].evaluations if job.label == label), walk.ledger


def mlflow_runs(file: Path):
    client = MlflowClient(f"sqlite:///{file.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], "tags.cell_id != ''")
    return client, {each.info.run_id: each for each in runs}


def test_added_to_a_finished_grid_it_runs_alone_and_into_the_same_runs(grid):
    file, before, after = grid
    assert before.exit_code == after.exit_code == 0, after.failed
    assert after.executed == len(TASKS) * 2, "one job a task and cell, nothing trained again"
    _, runs = mlflow_runs(file)
    assert len(runs) == 2
    for each in runs.values():
        scores = each.data.metrics
        assert {"eval/vqa/accuracy", "eval/bench/gqa/exact_match", "eval/bench/pope/pope_f1_score"} <= scores.keys()
        assert {"eval/bench/mme/mme_perception_score", "eval/bench/textvqa_val/exact_match"} <= scores.keys()
    assert run(file).executed == 0


def test_scores_are_those_of_the_answers_that_were_kept(grid):
    """Each score, from the records alone, by arithmetic of this test."""
    file, *_ = grid
    experiment = llv.load(file)
    for cell in experiment.cells:
        found = {task: cell.predictions(f"bench/{task}") for task in TASKS}
        records = {task: document["predictions"] for task, document in found.items()}
        assert [len(records[task]) for task in TASKS] == [8] * 4

        pope = [(each["answer"].lower().strip(), each["expected"]) for each in records["pope"]]
        assert cell.metrics["eval/bench/pope/pope_accuracy"] == sum(a == b for a, b in pope) / 8

        said = [next((w for w in ("yes", "no") if w in each["answer"].lower()[:4]), "") for each in records["mme"]]
        right = [one == each["expected"].lower() for one, each in zip(said, records["mme"], strict=True)]
        total = 0.0
        for subtask in (right[0:2] + right[4:6], right[2:4] + right[6:8]):  # pictures alternate: OCR, count
            pairs = [all(subtask[i : i + 2]) for i in (0, 2)]
            total += 100 * sum(subtask) / 4 + 100 * sum(pairs) / 2
        assert cell.metrics["eval/bench/mme/mme_perception_score"] == pytest.approx(total)

        digits = [json.loads(json.dumps(each["scores"]))["exact_match"] for each in records["textvqa_val"]]
        assert cell.metrics["eval/bench/textvqa_val/exact_match"] == pytest.approx(sum(digits) / 8)
        gqa = [each["answer"].lower().strip(" .") == each["expected"] for each in records["gqa"]]
        assert cell.metrics["eval/bench/gqa/exact_match"] == sum(gqa) / 8
        assert all(len(each["images"]) == 1 for some in records.values() for each in some)
    job, ledger = job_of(file, "bench/textvqa_val")
    mark = ledger.evaluation(job.id)["fingerprint"]
    assert mark["toolkit"] == "lmms-eval 0.7.2" and mark["definitions"] == "llavolta 1"
    assert mark["task"].startswith("textvqa_val") and mark["prompt"].startswith("chat_template")
    assert (mark["batch_size"], mark["dtype"], mark["compressor"]) == (16, "float32", "none")


def test_what_is_retained_of_the_baseline_needs_no_further_run(grid):
    """The mean share of the baseline's scores, from the table's own; in the same MLflow runs."""
    file, *_ = grid
    spec = json.loads(file.read_text())
    tasks = {"mme": "mme_perception_score", "pope": "pope_f1_score"}
    spec["evaluate"]["bench"] |= {"tasks": list(tasks), "average": "retained"}
    spec["report"] = {"baseline": {"phases.finetune.schedule": "full"}}
    other = file.with_name("retained.yaml")
    other.write_text(json.dumps(spec))
    outcome = run(other)
    assert (outcome.exit_code, outcome.executed) == (0, 0), outcome.failed
    full, heavy = (cell.metrics for cell in llv.load(other).cells)
    shares = [heavy[name] / full[name] for name in (f"eval/bench/{task}/{key}" for task, key in tasks.items())]
    assert full["eval/bench/retained"] == 1.0
    assert heavy["eval/bench/retained"] == pytest.approx(sum(shares) / 2)
    _, runs = mlflow_runs(file)
    logged = [each.data.metrics["eval/bench/retained"] for each in runs.values()]
    assert sorted(logged) == sorted(cell["eval/bench/retained"] for cell in (full, heavy))


def test_prompts_and_answers_are_those_of_the_packages_own_evaluations(grid, tmp_path):
    """The same pictures and questions as rows of a data set: answer by answer the same."""
    file, *_ = grid
    for name in ("pope", "textvqa_val"):
        job, ledger = job_of(file, f"bench/{name}", cell=1)
        kept = ledger.predictions(job.id)
        model = load_model(job, ledger.state_folder(job.state) / "weights/model.safetensors", torch.device("cpu"))
        from datasets import load_dataset

        folder, split = {"pope": ("POPE", "test"), "textvqa_val": ("textvqa", "validation")}[name]
        docs = load_dataset(f"lmms-lab/{folder}", split=split, cache_dir=str(file.parent / "cache"))
        rows = []
        for number, doc in enumerate(docs):
            path = tmp_path / f"{name}{number}.png"
            doc["image"].convert("RGB").save(path)
            question = doc["question"] if name == "pope" else doc["question"].capitalize()
            turn = plugin.Turn("user", f"<image>\n{question}{PROMPT}")
            rows.append(plugin.Row(number, (plugin.ImageRef(str(path)),), (turn,)))
        with attached(model, job), evaluation_mode(model):
            answers = plugin.greedy_answers(model, rows, evaluation_data(job), 3, 128)
        assert answers == [each["answer"] for each in kept]
        assert any(answers), "an untrained model says something too"


@contextlib.contextmanager
def attached(model, job):
    from orchestrator.compression import attach

    attachment = attach(model, [dict(point) for point in job.points])
    try:
        yield
    finally:
        attachment.detach()


def test_answers_do_not_depend_on_the_batch_size(grid):
    from orchestrator_plugins.benchmarks.evaluation import LmmsEval
    from orchestrator_plugins.benchmarks.spec import LmmsEvalSpec

    file, *_ = grid
    job, ledger = job_of(file, "bench/gqa", cell=1)
    model = load_model(job, ledger.state_folder(job.state) / "weights/model.safetensors", torch.device("cpu"))
    said = {}
    for size in (1, 16):
        spec = LmmsEvalSpec.model_validate({**job.spec, "batch_size": size})
        with attached(model, job), evaluation_mode(model):
            outcome = LmmsEval(spec).run(model, evaluation_data(job), plugin.Workers())
        said[size] = [each["answer"] for each in outcome.predictions]
    assert said[1] == said[16] == [each["answer"] for each in ledger.predictions(job.id)]


def test_the_process_is_as_it_was(grid):
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False, "lmms-eval lets Pillow read truncated images"
    assert distributed_c10d.default_pg_timeout.total_seconds() == 1800, "and raises the limit of process groups"
    assert "WORLD_SIZE" not in os.environ and not torch.distributed.is_initialized()


def test_stopped_within_a_suite_it_goes_on_after_the_last_finished_task(grid):
    file, *_ = grid
    other = with_entry(file, "again", tasks=TASKS, limit=4)

    write = Ledger.write_evaluation

    def then_stop(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(llv.Interrupted):
        patch.setattr(Ledger, "write_evaluation", then_stop)
        run(other)
    walk = prepare(other)
    tests = [job for cell in walk.cells for job in cell.evaluations if job.name == "again"]
    done = [job.id for job in tests if walk.ledger.evaluation(job.id)]
    assert len(done) == 1
    outcome = run(other)
    assert outcome.exit_code == 0 and outcome.executed == len(tests) - 1


@pytest.mark.slow
def test_killed_within_a_suite_it_goes_on_after_the_last_finished_task(grid):
    """The same of a process that is killed: SIGKILL as soon as the first task is in the ledger."""
    file, *_ = grid
    other = with_entry(file, "killed", tasks=TASKS, limit=2)
    program = (
        "import os, signal, orchestrator as llv\n"
        "from orchestrator.plan.ledger import Ledger\n"
        "write = Ledger.write_evaluation\n"
        "def then_die(*arguments):\n"
        "    write(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Ledger.write_evaluation = then_die\n"
        f"llv.load({str(other)!r}).run(local=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=file.parent, check=False).returncode == -9
    walk = prepare(other)
    tests = [job for cell in walk.cells for job in cell.evaluations if job.name == "killed"]
    assert sum(walk.ledger.evaluation(job.id) is not None for job in tests) == 1
    outcome = run(other)
    assert outcome.exit_code == 0 and outcome.executed == len(tests) - 1


def test_missing_data_costs_its_task_alone(grid, monkeypatch):
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())
    file, *_ = grid
    write_own(file.parent / "own")
    other = with_entry(file, "absent", tasks=["own_absent", "pope"], include_path="own", limit=2)
    outcome = run(other)
    assert outcome.exit_code == 1
    (reason,) = set(outcome.failed.values())
    assert "task own_absent" in reason and "nowhere/absent" in reason and "working directory" in reason
    for cell in llv.load(other).cells:
        assert cell.metrics["eval/vqa/accuracy"] >= 0 and "eval/absent/pope/pope_accuracy" in cell.metrics


OWN = """
task: own_{name}
dataset_path: {data}
dataset_kwargs: {loading}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
doc_to_choice: {choices}
{results}
metric_list:
- {{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}
generation_kwargs: {generation}
"""
UTILS = """
import json
from lmms_eval.tasks._task_utils.file_utils import generate_submission_file

def visual(doc):
    return [doc["image"].convert("RGB")]

def score(doc, results):
    return {"own": float(len(results[0])), "submission": {"id": doc["id"], "answer": results[0]}}

def nan(items):
    return float("nan")

def submit(items, args):
    with open(generate_submission_file("own_2026-11-29-17-00-00.json", args), "w") as file:
        json.dump(items, file)
"""


def write_own(folder: Path, utils: str = UTILS) -> Path:
    """Tasks of one's own: `own_nan`, `own_submit`, `own_sampled`, `own_choice`."""
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text(utils)
    scored = "process_results: !function utils.score"
    greedy = "{max_new_tokens: 4, do_sample: false}"
    hub = {"data": "lmms-lab/POPE", "loading": "null"}
    same = {
        **hub,
        "kind": "generate_until",
        "target": "answer",
        "choices": "null",
        "generation": greedy,
        "results": scored,
    }
    tasks = {
        "nan": {**same, "metric": "own", "aggregation": "!function utils.nan"},
        "submit": {**same, "metric": "submission", "aggregation": "!function utils.submit"},
        "sampled": {**same, "metric": "own", "aggregation": "mean", "generation": "{do_sample: true, temperature: 1}"},
        "absent": {**same, "metric": "own", "aggregation": "mean", "data": "nowhere/absent",
                   "loading": "{load_from_disk: true}"},
        "choice": {**hub, "kind": "multiple_choice", "target": "answer", "choices": '["yes", "no"]', "results": "",
                   "generation": "null", "metric": "acc", "aggregation": "mean"},
    }  # fmt: skip
    for name, fields in tasks.items():
        (folder / f"{name}.yaml").write_text(OWN.format(name=name, **fields))
    return folder


def test_nan_and_sampling_are_failures_with_their_reasons(grid):
    file, *_ = grid
    write_own(file.parent / "own")
    other = with_entry(file, "bad", tasks=["own_nan", "own_sampled"], include_path="own", limit=2)
    outcome = run(other)
    reasons = " ".join(outcome.failed.values())
    assert outcome.exit_code == 1 and "own is nan" in reasons, reasons
    walk = prepare(other)
    sampled = [walk.ledger.failure(job.id) for job in walk.cells[0].evaluations if job.label == "bad/own_sampled"]
    assert "asks for sampling" in sampled[0]["error"]


def test_a_submission_becomes_an_artifact_and_its_score_is_recorded(grid):
    file, *_ = grid
    write_own(file.parent / "own")
    other = with_entry(file, "served", tasks=["own_submit"], include_path="own")
    assert run(other).exit_code == 0
    experiment = llv.load(other)
    cell = experiment.cells[0]
    assert cell.metrics["eval/served/own_submit/submitted"] == 8
    client, runs = mlflow_runs(other)
    (mine,) = [each for each in runs.values() if each.data.tags["cell_id"] == cell.id]
    (artifact,) = client.list_artifacts(mine.info.run_id, "eval/served/own_submit")
    assert artifact.path == "eval/served/own_submit/own.json", "the time of writing is no part of its name"
    written = json.loads(Path(client.download_artifacts(mine.info.run_id, artifact.path)).read_text())
    answers = [each["answer"] for each in cell.predictions("served/own_submit")["predictions"]]
    assert [each["answer"] for each in written] == answers

    name = "eval/served/own_submit/accuracy"
    with pytest.raises(llv.UsageError, match="was measured"):
        experiment.record(cell.name, {"eval/served/own_submit/submitted": 1}, source="nobody")
    with pytest.raises(llv.UsageError, match="no such evaluation; did you mean eval/served/own_submit/accuracy"):
        experiment.record(cell.name, {"eval/served/own_submt/accuracy": 1}, source="nobody")
    with pytest.raises(llv.UsageError, match="finite"):
        experiment.record(cell.name, {name: float("nan")}, source="nobody")
    outcome = experiment.record(cell.name, {name: 78.5}, source="EvalAI, 29 November", console=Console(quiet=True))
    (row,) = [row for row in outcome.table.rows if row.cells == (cell.name,)]
    assert row.recorded == {name: "EvalAI, 29 November"} and "EvalAI" in outcome.table.explanations()
    assert "78.500†" in outcome.table.to_markdown()
    _, runs = mlflow_runs(other)
    assert len(runs) == 2 and runs[mine.info.run_id].data.metrics[name] == 78.5
    assert run(other).executed == 0, "a recorded score is no reason to run anything"


@pytest.mark.slow
def test_own_tasks_are_part_of_the_identity_by_their_source(grid):
    file, *_ = grid
    folder = write_own(file.parent / "mine")
    other = with_entry(file, "choice", tasks=["own_choice"], include_path="mine")
    assert (outcome := run(other)).executed == 2, outcome.failed
    for cell in llv.load(other).cells:
        assert 0 <= cell.metrics["eval/choice/own_choice/acc"] <= 1
    assert run(other).executed == 0
    write_own(folder, f"{UTILS}\n# another version\n")
    assert run(other).executed == 2


@pytest.mark.slow
def test_choices_are_compared_by_their_likelihood(grid):
    """Which choice the toolkit took, against the losses of plain rows."""
    file, *_ = grid
    write_own(file.parent / "own")
    other = with_entry(file, "likely", tasks=["own_choice"], include_path="own")
    run(other)
    job, ledger = job_of(other, "likely/own_choice")
    model = load_model(job, ledger.state_folder(job.state) / "weights/model.safetensors", torch.device("cpu"))
    from datasets import load_dataset

    docs = load_dataset("lmms-lab/POPE", split="test", cache_dir=str(file.parent / "cache"))
    right = []
    for number, doc in enumerate(docs):
        path = file.parent / f"choice{number}.png"
        doc["image"].convert("RGB").save(path)
        asked = plugin.Turn("user", f"<image>\n{doc['question']}")
        images = (plugin.ImageRef(str(path)),)
        rows = [plugin.Row(number, images, (asked, plugin.Turn("assistant", word))) for word in ("yes", "no")]
        with evaluation_mode(model):
            losses = plugin.answer_losses(model, rows, evaluation_data(job), 2)
        yes, no = (each.nats / each.tokens for each in losses)
        right.append(("yes" if yes <= no else "no") == doc["answer"])
    kept = [each["scores"]["acc"] for each in ledger.predictions(job.id)]
    assert kept == [float(each) for each in right]


def test_an_exported_folder_is_a_model_of_lmms_eval(grid, tmp_path):
    """A plain user of lmms-eval names the folder and gets the recorded compressor."""
    from lmms_eval.evaluator import simple_evaluate

    file, *_ = grid
    cell = next(cell for cell in llv.load(file).cells if cell.axes["phases.finetune.schedule"] == "heavy")
    folder = cell.export(tmp_path / "out")
    found = simple_evaluate(
        model="llavolta", model_args=f"pretrained={folder}", tasks=["pope"], task_manager=manager_of("pope"),
        batch_size=4, bootstrap_iters=0, device="cpu",
    )  # fmt: skip
    answers = [each["filtered_resps"][0] for each in found["samples"]["pope"]]
    kept = cell.predictions("bench/pope")["predictions"]
    assert answers == [each["answer"] for each in kept]
    full = next(each for each in llv.load(file).cells if each.name != cell.name)
    assert json.loads((folder / "llavolta.json").read_text())["points"], full.name


def manager_of(family: str):
    from lmms_eval.tasks import TaskManager
    from orchestrator_plugins.benchmarks.tasks import installed

    return TaskManager("ERROR", include_path=[str(installed() / family)], include_defaults=False)


def test_every_task_of_the_suite_is_defined_with_functions_that_are_there(tmp_path, monkeypatch):
    """As far as can be told without its data: every function that a definition names is imported."""
    from orchestrator_plugins.benchmarks.evaluation import _manager, _output_types
    from orchestrator_plugins.benchmarks.suites import SCORES
    from orchestrator_plugins.benchmarks.tasks import sources

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    places, _ = sources(SCORES, None, tmp_path / "tasks")
    manager = _manager(places, ("gpt_eval_score",))
    for name, score in SCORES.items():
        config = manager._get_config(name)
        metrics = [each["metric"] for each in config["metric_list"]]
        assert callable(config["doc_to_visual"]) and config["dataset_path"] and config["test_split"], name
        if score.metric == "accuracy":
            assert metrics == ["submission"], name
        elif not score.judged:
            assert score.metric in metrics, name
        assert _output_types(manager, name) == {"generate_until"}


def test_records_are_complete_in_the_ledger(grid):
    file, *_ = grid
    job, ledger = job_of(file, "bench/pope")
    lines = gzip.decompress((ledger.storage / f"predictions/{job.id}.jsonl.gz").read_bytes()).splitlines()
    first = json.loads(lines[0])
    assert {"row", "task", "question", "expected", "answer", "score", "images", "doc_hash", "scores"} <= first.keys()
    assert first["question"].endswith(PROMPT) and first["task"] == "pope"
