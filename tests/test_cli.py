"""The verbs that look: quick, without torch, Ray or MLflow, one block for every error, JSON where asked."""

import json
import subprocess
import sys
import time

import pytest

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


def test_help_and_validate_answer_at_once(llavolta, tiny_experiment):
    """`--help` under 0.5 s and `validate` under 1 s; the best of several starts, since tests share their machine."""

    def best(*arguments):
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            assert llavolta(*arguments).returncode == 0
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    assert best("--help") < 0.5
    assert best("validate", tiny_experiment) < 1.0


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
        (["run", "SPEC", "--set", "phases.finetune.max_stepz=3"], "max_steps"),
    ],
)
def test_a_wrong_call_is_one_block_and_exit_code_2(llavolta, tiny_experiment, arguments, told):
    call = [tiny_experiment if argument == "SPEC" else argument for argument in arguments]
    done = llavolta(*call)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr


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
