"""What looks at an experiment stays light: a fresh interpreter holds no framework after it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
from conversations import say
from orchestrator_plugins.data.llava_json import LlavaJsonSpec
from repository import ROOT, TINY_LLAVA

from orchestrator.data.check import RowCheck, check_rows, left_out
from orchestrator.plan.identity import share_caches
from orchestrator.spec.model import ModelSpec

LIBRARIES = ("asyncio", "boto3", "matplotlib", "mlflow", "numpy", "optuna", "pandas", "PIL", "ray", "torch")


def loaded_of(names: Iterable[str], code: str, *arguments: object) -> list[str]:
    """Modules of these names that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport sys; print(*[name for name in {tuple(names)} if name in sys.modules])"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_help_loads_only_the_command_line():
    code = "from orchestrator.cli import main\ntry: main()\nexcept SystemExit: pass"
    readers = ("orchestrator.experiment", "orchestrator.registry", "orchestrator.spec", "pydantic", "rich", "yaml")
    assert loaded_of((*readers, *LIBRARIES), code, "--help") == []


def test_loading_an_experiment_loads_no_library_of_the_work(tiny_experiment: Path):
    assert loaded_of(LIBRARIES, "import sys, orchestrator as llv; llv.load(sys.argv[1])", tiny_experiment) == []


def test_specs_and_rows_import_no_torch():
    code = (
        "import sys; from orchestrator_plugins.data.easy_vqa import EasyVqaSpec, EasyVqa;"
        "from orchestrator_plugins.data.llava_json import LlavaJsonSpec;"
        "from orchestrator_plugins.data.digit_grid import DigitGridSpec, DigitGrid;"
        "from orchestrator_plugins.evaluations.exact_match import ExactMatchSpec;"
        "EasyVqa(EasyVqaSpec(split='test')).rows(); DigitGridSpec().content_digest();"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_planning_needs_no_torch():
    code = "import importlib, pkgutil, sys, orchestrator.plan as plan\n"
    code += (
        "for found in pkgutil.walk_packages(plan.__path__, 'orchestrator.plan.'): importlib.import_module(found.name)\n"
    )
    code += "bad = {'torch', 'transformers', 'ray', 'mlflow', 'numpy'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_spec_needs_no_torch():
    code = "import sys, orchestrator_plugins.compressors.average_pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_specs_of_built_in_methods_load_no_torch():
    code = (
        "import orchestrator.plugin, orchestrator_plugins.compressors.tome, orchestrator_plugins.data.llava_json\n"
        "import orchestrator_plugins.evaluations.exact_match, sys\n"
        "assert not {'torch', 'transformers', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_a_name_that_needs_torch_loads_it():
    code = "import orchestrator.plugin, sys; orchestrator.plugin.take; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_heavy_framework_is_imported(tiny_experiment: Path) -> None:
    code = (
        "import sys; from orchestrator.spec.loaded import resolved_yaml\n"
        "from orchestrator.spec.loader import load_experiment\n"
        "resolved_yaml(load_experiment(sys.argv[1]))\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'deepspeed', 'numpy', 'rapidfuzz'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_experiment)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_loading_takes_less_than_a_framework() -> None:
    def seconds_of(code: str) -> float:
        timed = f"import sys, time; start = time.process_time()\n{code}\nprint(time.process_time() - start)"
        run = [sys.executable, "-c", timed, str(ROOT / "experiments" / "quickstart.yaml")]
        return min(float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(3))

    loading = seconds_of("from orchestrator.spec.loader import load_experiment; load_experiment(sys.argv[1])")
    assert loading < 0.7 * seconds_of("import torch")  # 0.35 of it


def test_looking_up_what_was_found_needs_no_torch(tmp_path, pictures):
    share_caches(None)  # an experiment that another test loaded in this process has a storage of its own
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps(
            [
                {"image": "0.png", "conversations": say("<image>\nWhat?", "a")},
                {"conversations": say("word " * 300, "b")},
            ]
        )
    )
    spec = LlavaJsonSpec(
        data_path=str(path), image_folder=str(pictures), conversation_template="vicuna_v1", on_bad_row="drop",
        max_bad_share=0.5,
    )  # fmt: skip
    model = ModelSpec(model_name_or_path=str(TINY_LLAVA))
    assert left_out(spec, model, 512, False) == []
    assert list(check_rows(RowCheck(spec, model, 512, False)).bad) == [1]
    code = (
        "import sys; from orchestrator.data.check import left_out; from orchestrator.spec.model import ModelSpec;"
        "from orchestrator_plugins.data.llava_json import LlavaJsonSpec;"
        f"spec, model = LlavaJsonSpec(**{spec.model_dump()!r}), ModelSpec(model_name_or_path={str(TINY_LLAVA)!r});"
        "print(left_out(spec, model, 512, False));"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[1]", "[]"]
