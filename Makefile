SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS := throughput tensor pipeline recovery startup overhead plan checkpoint memory unequal simulate
# One thread per process: several workers share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup train test soak bench lint

help:
	@echo "make setup   .venv with everything that evenkeel needs"
	@echo "make train   setup, then a small GPT trained here on 4 workers, one of which is killed midway"
	@echo "make test    setup, then every test that needs no GPU"
	@echo "make soak    the full fault matrix and the long runs, up to an hour"
	@echo "make bench   the benchmarks, side by side with the peers"
	@echo "make lint    ruff and mypy"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@[ "$$(uname -s)" = Linux ] || { echo "evenkeel runs on Linux only; this is $$(uname -s)" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; evenkeel needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "evenkeel needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "setting up $(VENV) (the first time takes some minutes)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: setup
	$(BIN)/python jobs/train.py --config conf/local.yaml run.name=local-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python tests/run.py

soak: setup
	@mkdir -p runs
	@$(BIN)/python -m pytest -m "soak and not gpu" --show-capture=no --junitxml=runs/soak.xml --durations=10 tests; status=$$?; \
		$(BIN)/python tests/faults_table.py --write runs/soak.xml && echo "the tables are in docs/faults.md"; exit $$status

bench: setup
	@for name in $(BENCHMARKS); do $(BIN)/python jobs/benchmark.py $$name || exit; done

lint: setup
	$(BIN)/ruff check platform tests jobs
	$(BIN)/mypy
