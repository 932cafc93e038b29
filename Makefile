# Everything a newcomer or a developer does here. Each target does its own set-up; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
EXTRAS ?= [dev]
PIP_FLAGS ?=
FUZZ_SECONDS ?= 600
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Without what it declares: torchvision has no CPU build for this torch, and another would replace it.
LMMS_EVAL = --no-deps lmms-eval==0.7.2
# Takes seconds where pip takes minutes. It does not read pip's settings: where it reaches no index, pip goes on.
UV_INSTALL = $(if $(PIP_FLAGS),false,'$(BIN)/uv' pip install --quiet --python '$(BIN)/python' --constraint constraints.txt)
SUPPORTED = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
# 3.11 is what the tests run on here, so it is preferred over what `python3` happens to be.
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.10; do \
	if $$name -c '$(SUPPORTED)' >/dev/null 2>&1; then echo $$name; break; fi; done)
CODE = orchestrator plugins experiments tests
# Compiled modules are kept whatever the user's setting: else every process that a test starts compiles them again.
CACHED = env -u PYTHONDONTWRITEBYTECODE
# Two test files at a time, each with one thread: two that take both cores spin and wait for each other (8 x slower).
# Files come in the order of tests/conftest.py, the longest first, so that neither worker waits for the other's last.
PYTEST = $(CACHED) OMP_NUM_THREADS=1 '$(BIN)/python' -m pytest -m 'not slow' --numprocesses 2 --dist loadfile --no-loadscope-reorder
UNIT = tests/unit
INTEGRATION = tests/integration tests/golden

# What `test-python` installs and runs under each other Python: all that needs no torch.
PYTHONS = 3.10 3.11 3.12 3.13
LIGHT = pydantic pyyaml rapidfuzz tokenizers pillow psutil numpy typer rich easy-vqa scikit-learn jinja2 pyarrow av \
	pytest pytest-timeout hypothesis jsonschema tomli
LIGHT_TESTS = $(addprefix tests/,$(addprefix unit/,spec plan search plugins testing test_plugin_module.py) \
	$(addprefix integration/,plan search plugins)) --ignore tests/integration/plugins/test_example_plugin.py

.PHONY: help install benchmarks quickstart test-unit test-integration test-faults test test-all fuzz test-python check format format-check lint types imports docs sbom lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 20

install: $(STAMP)  ## the environment in .venv, exact versions (minutes the first time, nothing after)

# torch goes in first and alone: with exactly this version present, no other package can pull a newer build.
$(STAMP): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.10 to 3.13 found; install one or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo 'make: $(PYTHON) is not Python 3.10 to 3.13; name one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'Installing into $(VENV) with $(PYTHON); this takes a few minutes the first time.'
	@rm -f '$@'
	@$(PYTHON) -m venv '$(VENV)' || { echo 'make: $(PYTHON) has no venv module (Debian and Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
	@export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT='$(CURDIR)/constraints.txt'; \
	'$(BIN)/python' -m pip install --quiet $(PIP_FLAGS) torch uv; \
	$(UV_INSTALL) --editable '.$(EXTRAS)' || '$(BIN)/python' -m pip install --quiet $(PIP_FLAGS) --editable '.$(EXTRAS)'; \
	if [[ '$(EXTRAS)' == *dev* ]]; then '$(BIN)/python' -m pip install --quiet $(PIP_FLAGS) $(LMMS_EVAL); fi
	@touch '$@'
	@echo 'Installed. The program is $(BIN)/llavolta.'

benchmarks: $(STAMP)  ## add lmms-eval, for evaluations of `kind: lmms_eval` (the development environment has it)
	@PIP_CONSTRAINT='$(CURDIR)/constraints.txt' '$(BIN)/python' -m pip install --quiet $(PIP_FLAGS) --editable '.[benchmarks]'
	@'$(BIN)/python' -m pip install --quiet $(PIP_FLAGS) $(LMMS_EVAL)

quickstart: $(STAMP)  ## test a trained tiny LLaVA on fewer visual tokens, then train three schedules (minutes)
	@'$(BIN)/llavolta' run experiments/redundancy.yaml
	@'$(BIN)/llavolta' run experiments/quickstart.yaml

test-unit: $(STAMP)  ## single modules in one process (3 minutes)
	@$(PYTEST) $(UNIT) $(ARGS)

test-integration: $(STAMP)  ## whole runs, several processes, servers on loopback, the docs' tutorials
	@$(PYTEST) $(INTEGRATION) $(ARGS)

test-faults: $(STAMP)  ## runs that are killed, stopped, damaged or cut off
	@$(PYTEST) tests/faults $(ARGS)

test: $(STAMP)  ## unit and integration; more options: make test ARGS='-k plan'
	@$(PYTEST) $(UNIT) $(INTEGRATION) $(ARGS)

test-all: $(STAMP)  ## every test, the faults, the slow ones and the notebook included
	@'$(BIN)/python' -m pytest $(ARGS)
	@$(if $(ARGS),,$(CACHED) OMP_NUM_THREADS=1 '$(BIN)/python' -m pytest --nbmake --nbmake-timeout 600 examples)

fuzz: $(STAMP)  ## what reads files of strangers, under atheris, for FUZZ_SECONDS (600) each; its findings are in .fuzz
	@'$(BIN)/python' -m pip install --quiet --no-deps atheris==3.0.0
	@for reader in experiments rows images; do \
		mkdir -p .fuzz/$$reader; \
		'$(BIN)/python' tests/fuzz/readers.py $$reader .fuzz/$$reader/corpus \
			-max_total_time=$(FUZZ_SECONDS) -artifact_prefix=.fuzz/$$reader/ || exit 1; \
	done

test-python: $(STAMP)  ## under every other Python 3.10 to 3.13 found: the tests that need no torch
	@for version in $(PYTHONS); do \
		python=$$(ls -d "$$HOME"/.pyenv/versions/$$version.*/bin/python 2>/dev/null | tail -n 1 || true); \
		if python$$version -c '' 2>/dev/null; then python=python$$version; fi; \
		if [ -z "$$python" ]; then echo "Python $$version: not found, not tested"; continue; fi; \
		if '$(BIN)/python' -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')"; then continue; fi; \
		venv=.venv-$$version; export VIRTUAL_ENV=$$PWD/$$venv; \
		test -d $$venv || '$(BIN)/uv' venv --quiet --python "$$python" $$venv; \
		'$(BIN)/uv' pip install --quiet --constraint constraints.txt $(LIGHT); \
		'$(BIN)/uv' pip install --quiet --no-deps --editable .; \
		echo "Python $$version: $(LIGHT_TESTS)"; \
		$$venv/bin/python -m pytest -m 'not slow' -r fE $(LIGHT_TESTS) > $$venv/tests.log 2>&1 & runs="$${runs:-} $$venv:$$!"; \
	done; \
	failed=0; for run in $${runs:-}; do \
		if wait $${run#*:}; then tail -n 1 $${run%%:*}/tests.log; else failed=1; cat $${run%%:*}/tests.log; fi; \
	done; exit $$failed

check: format-check lint types imports test  ## format, lint, types, import contract, tests

format: $(STAMP)  ## rewrite the code in the house format
	@'$(BIN)/ruff' check --fix $(CODE)
	@'$(BIN)/ruff' format $(CODE)

format-check: $(STAMP)
	@'$(BIN)/ruff' format --check $(CODE)

lint: $(STAMP)
	@'$(BIN)/ruff' check $(CODE)

types: $(STAMP)
	@'$(BIN)/mypy'

imports: $(STAMP)
	@'$(BIN)/lint-imports'

docs: $(STAMP)  ## the docs site in site/, complete links only
	@NO_MKDOCS_2_WARNING=1 '$(BIN)/python' -m mkdocs build --strict --quiet

sbom: $(STAMP)  ## what is installed, with licences, in sbom.json (CycloneDX)
	@'$(BIN)/uv' tool run --quiet --from cyclonedx-bom cyclonedx-py environment '$(VENV)' --output-file sbom.json

lock: $(STAMP)  ## renew constraints.txt after a change of pyproject.toml (known versions stay)
	@head -n 1 constraints.txt > constraints.new
	@'$(BIN)/uv' pip compile --quiet --universal --python-version 3.10 --extra dev --no-header --no-annotate \
		--output-file constraints.txt pyproject.toml
	@cat constraints.txt >> constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the environment and caches; finished runs in runs/ stay
	@rm -rf .venv .venv-3.* build site ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find orchestrator plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
