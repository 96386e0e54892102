# Two commands do everything: `make quickstart` and `make test`. Both create or reuse a virtual environment in $(VENV).
# PIP_ARGS reaches pip, for instance an index with another torch build; RLHF_ARGS reaches the quickstart.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
RLHF_ARGS ?=
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow crash-test mutation notebook-runs lint install clean

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-development: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test,lint]'
	touch $@

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/rlhf run experiment=quickstart $(RLHF_ARGS)

test: $(VENV)/.installed-development
	$(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-development
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Kills the pipeline a hundred times and damages its checkpoints, see docs/reliability.md; CRASH_ARGS reaches the harness.
crash-test: $(VENV)/.installed-development
	$(BIN)/python -m tests.distributed.crash_harness $(CRASH_ARGS)
	$(BIN)/python -m tests.distributed.crash_harness --damage $(CRASH_ARGS)

# Breaks each operation of the maths on purpose and sees a test fail; rewrites experiments/mutation.
mutation: $(VENV)/.installed-development
	$(BIN)/python -m tests.mutation.run

# Trains the tiny runs that the notebooks read, and executes the notebooks.
notebook-runs: $(VENV)/.installed-development
	$(BIN)/python notebooks/make_runs.py
	$(BIN)/python notebooks/execute.py

lint: $(VENV)/.installed-development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
