# Each target does all its own set-up in .venv, and is quick the second time.
#
#   make run      start the service on port 9000
#   make test     run the tests
#   make lab      run the tests in network namespaces alone; needs root, iproute2 and nftables
#   make lint     ruff and mypy
#   make bench    measure, side by side with the published version

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test lab lint bench clean
.DELETE_ON_ERROR:

run: $(VENV)/run.stamp
	@$(BIN)/port-checker

test: $(VENV)/dev.stamp
	@$(BIN)/pytest

lab: $(VENV)/dev.stamp
	@$(BIN)/pytest tests/lab

lint: $(VENV)/dev.stamp
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(VENV)/dev.stamp
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .benchmarks .coverage .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Python 3.11 or later is needed; make PYTHON=python3.11 names another one.")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/run.stamp
