# Every target runs in $(VENV), which is made on first use and again when its inputs change.
#   make test PYTHON=python3.12     another interpreter (3.11 or newer)
#   make setup RUNTIME=cpu          onnxruntime instead of onnxruntime-gpu, whatever the machine has

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
RUNTIME ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(RUNTIME)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types tests format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything into it

# The CPU and GPU builds of onnxruntime overwrite each other's files, so a change of RUNTIME starts afresh.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    f"onnxptq needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	@for old in $(VENV)/.installed-*; do \
	    if [ -e "$$old" ] && [ "$$old" != "$@" ]; then rm -rf $(VENV); fi; done
	@echo "installing onnxptq[$(RUNTIME),dev,demo] into $(VENV) (about a minute after the downloads)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e ".[$(RUNTIME),dev,demo]"
	@$(BIN)/python -m pip check
	@touch $@

demo: setup ## quantize a real model on real photographs, into ./demo
	@$(BIN)/python -m tools.demo demo

test: lint types tests ## lint, types and tests: what continuous integration runs

lint: setup ## ruff, its formatting, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: setup ## mypy --strict
	$(BIN)/mypy

# One thread per worker: the workers already fill the cores.
tests: setup ## pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

format: setup ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove environments, caches, build output and ./demo
	rm -rf .venv .ci-venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache
	find onnxptq cli models tools tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
