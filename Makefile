# Each target does all its own set-up in .venv, and is quick the second time.
#
#   make run      start the service on port 9000
#   make test     run the tests
#   make cover    run the tests and tell which lines they did not reach
#   make lab      run the tests in network namespaces alone; needs root, iproute2 and nftables
#   make lint     ruff and mypy
#   make fuzz     run the tests that make up requests, for minutes; FUZZ_EXAMPLES sets how many
#   make bench    measure, side by side with the published version
#   make soak     keep the service busy and watch what grows; SOAK_MINUTES sets how long

PYTHON ?= python3
VENV ?= .venv
# Files of tests that run at once: tests wait more than they work.
TESTS_AT_ONCE ?= 3
FUZZ_EXAMPLES ?= 2000
SOAK_MINUTES ?= 2
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test cover lab lint fuzz bench soak clean
.DELETE_ON_ERROR:

run: $(VENV)/run.stamp
	@$(BIN)/port-checker

test: $(VENV)/dev.stamp
	@$(BIN)/pytest --numprocesses $(TESTS_AT_ONCE) --dist loadfile

cover: $(VENV)/dev.stamp
	@$(BIN)/pytest --cov --cov-report=term-missing

lab: $(VENV)/dev.stamp
	@$(BIN)/pytest tests/lab

lint: $(VENV)/dev.stamp
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

fuzz: $(VENV)/dev.stamp
	@FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest tests/server/test_fuzz.py tests/server/test_openapi.py

bench: $(VENV)/dev.stamp
	@$(BIN)/python -m benchmarks

soak: $(VENV)/dev.stamp
	@$(BIN)/python -m benchmarks.soak $(SOAK_MINUTES)

clean:
	rm -rf $(VENV) .benchmarks .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

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
