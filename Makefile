# On a bare machine: `make quickstart` shows both jobs, `make test` checks everything that is fast.

PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Stamps, so that a second make installs nothing: what the virtual environment holds, and since when.
DEV := .venv/.installed-dev
OFFLINE := .venv/.installed-offline

.PHONY: help .venv quickstart lint test test-slow bench clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart  install what is needed and run both jobs in minutes, without a model hub"
	@echo "make test        lint, types and the fast tests"
	@echo "make test-slow   the slow tests"
	@echo "make lint        ruff, mypy, and who may import whom"
	@echo "make bench       the benchmarks that need no data; evaluation.py and search.py say what they want"
	@echo "make .venv       only install, with everything for development"
	@echo "make clean       remove build outputs and caches; keeps .venv and runs"

.venv: $(DEV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "crossalign needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing; the first time this is several gigabytes and takes minutes"
	$(INSTALL) -e '.[dev]'
	@touch $(OFFLINE) $@

$(OFFLINE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing; the first time this is several gigabytes and takes minutes"
	$(INSTALL) -e '.[offline]'
	@touch $@

quickstart: $(OFFLINE)
	$(BIN)/crossalign quickstart

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m 'not slow' --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow --timeout 3600

bench: $(DEV)
	@for file in $(filter-out benchmarks/evaluation.py benchmarks/search.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
