"""The verbs that look: quick, without torch, Ray or MLflow, one block for every error, JSON where asked."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from program import run_anew
from repository import TINY_LLAVA

HEAVY = ("torch", "ray", "mlflow", "transformers", "deepspeed", "pandas", "matplotlib")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["validate", "SPEC"], ["plan", "SPEC", "--json"], ["status", "SPEC"], ["table", "SPEC"], ["schema"],
     ["compressors"], ["show", "SPEC", "--resolved"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_looking_imports_no_heavy_framework(tiny_experiment, tmp_path, arguments):
    code = (
        "import sys; from orchestrator.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    call = [str(tiny_experiment) if argument == "SPEC" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *call], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.fixture
def llavolta(tmp_path):
    """Started anew each time, as a user does."""
    return lambda *arguments: run_anew(arguments, tmp_path)


def test_validate_counts_cells_and_json_is_one_document(llavolta, tiny_experiment):
    assert llavolta("validate", tiny_experiment).stdout == "valid: 3 cells\n"
    done = llavolta("validate", tiny_experiment, "--json")
    assert json.loads(done.stdout)["cells"] == 3


def test_faults_are_told_together_with_positions(llavolta, tiny_experiment):
    text = tiny_experiment.read_text().replace("stride: 8", "strid: 8").replace("max_steps: 6", "max_steps: -6")
    tiny_experiment.write_text(text)
    done = llavolta("validate", tiny_experiment)
    assert done.returncode == 2 and done.stdout == ""
    assert "strid" in done.stderr and "stride" in done.stderr and "max_steps" in done.stderr
    assert "Traceback" not in done.stderr
    line = 1 + text.splitlines().index("  heavy: {kind: average_pool, layer: 1, strid: 8}")
    assert f"tiny.yaml:{line}:" in done.stderr
    document = json.loads(llavolta("validate", tiny_experiment, "--json").stdout)
    assert {fault["path"] for fault in document["faults"]} >= {"phases.finetune.max_steps"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["validate", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["validat"], "validate"),
        (["validate"], "SPEC"),
        (["logs", "SPEC", "--cell", "nobody"], "nobody"),
        (["logs", "SPEC", "--cell", "two_stage"], "did you mean schedule=two_stage?"),
        (["path", "SPEC", "--cell", "two_stge"], "did you mean schedule=two_stage?"),
        (["logs", "SPEC", "--cell", "hevy"], "did you mean schedule=heavy?"),
        (["path", "SPEC", "--cell", "x" * 999], "x... fits no cell; there are schedule=full"),
        (["path", "SPEC", "--cell", "schedule=full"], "no weights yet"),
        (["path", "SPEC"], "--cell: name one of schedule=full, schedule="),
        (["path", "SPEC", "--set", "matrix.phases.finetune.schedule=[full]"], "cell schedule=full has no weights yet"),
        (["run", "SPEC", "--set", "phases.finetune.max_stepz=3"], "max_steps"),
    ],
)
def test_a_wrong_call_is_one_block_and_exit_code_2(llavolta, tiny_experiment, arguments, told):
    call = [tiny_experiment if argument == "SPEC" else argument for argument in arguments]
    done = llavolta(*call)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("streams", "code"), [(">&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 1)])
def test_nobody_reads_what_is_printed(tiny_experiment, tmp_path, streams, code):
    command = f"{shlex.quote(sys.executable)} -m orchestrator plan {shlex.quote(str(tiny_experiment))} {streams}"
    env = {**os.environ, "LLAVOLTA_STORAGE": str(tmp_path / "storage")}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == ("error: the storage or the output: No space left on device\n" if code else "")


def test_plan_shows_the_tree_and_says_what_is_shared(llavolta, tiny_experiment):
    document = json.loads(llavolta("plan", tiny_experiment, "--json", "--text-tokens", "12").stdout)
    assert [cell["name"] for cell in document["cells"]] and document["totals"]["cells"] == 3
    runs = document["stage_runs"]
    assert len(runs) == 4 and sum(len(run["cells"]) == 2 for run in runs) == 1
    totals = document["totals"]
    assert totals["train_tflops_shared"] < totals["train_tflops_alone"]
    assert "stage tree" in llavolta("plan", tiny_experiment).stdout


def test_schema_accepts_the_file_and_refuses_a_mistyped_key(llavolta, tiny_experiment):
    import jsonschema
    import yaml

    schema = json.loads(llavolta("schema").stdout)
    tree = yaml.safe_load(tiny_experiment.read_text().replace("1.0e-3", "0.001"))
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**tree, "compresors": {}}, schema)


def records_file(folder):
    """A LLaVA JSON file of 130 rows with their pictures."""
    from PIL import Image

    rows = []
    for row in range(130):
        Image.new("RGB", (64, 64), (row, 0, 0)).save(folder / f"{row}.png")
        turns = [{"from": "human", "value": "<image>\\nHow red?"}, {"from": "gpt", "value": str(row)}]
        rows.append({"id": str(row), "image": f"{row}.png", "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_init_writes_an_experiment_that_is_valid_and_plans(llavolta, tmp_path):
    records = records_file(tmp_path)
    for name, arguments in (
        ("a.yaml", ()), ("b.yaml", ("--model", TINY_LLAVA)), ("c.yaml", ("--model", TINY_LLAVA, "--data", records)),
    ):  # fmt: skip
        done = llavolta("init", name, *arguments)
        assert done.returncode == 0, done.stderr
        assert ("rows.json as well, which is trained on" in done.stderr) == ("--data" in arguments)
        checked = llavolta("validate", name)
        assert (checked.returncode, checked.stdout) == (0, "valid: 3 cells\n"), checked.stderr
    assert json.loads(llavolta("plan", "c.yaml", "--json").stdout)["totals"]["cells"] == 3
    assert "data_path: rows.json" in (tmp_path / "c.yaml").read_text()


def test_init_overwrites_nothing_and_leaves_nothing_that_is_not_valid(llavolta, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "no-model").mkdir()
    for arguments, message in (
        (("mine.yaml",), "mine.yaml exists"),
        (("other.yaml", "--data", "nowhere.json"), "there is no such file"),
        (("other.yaml", "--model", "no-model"), "config.json"),
        (("other.txt",), "name a .yaml file"),
    ):
        done = llavolta("init", *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert not list(tmp_path.glob("other*"))


@pytest.mark.slow
def test_what_init_wrote_runs_small(llavolta, tmp_path):
    assert llavolta("init", "mine.yaml", "--model", TINY_LLAVA, "--data", records_file(tmp_path)).returncode == 0
    done = llavolta("run", "mine.yaml", "--smoke", "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answers accuracy (final)" in done.stdout
