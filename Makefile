# Each target installs what it needs into .venv first; from the second time on it starts at once.
#
#   make run          start the service on port 9000
#   make test         run the tests; those that need chromium, npm or the packages of make lint
#                     only where these are installed
#   make test-lowest  run them on the lowest versions that pyproject.toml allows
#   make cover        run all tests and list the lines they did not reach
#   make lab          run only the tests in network namespaces; needs root, iproute2 and nftables
#   make systemd-test  install the package in Debians that systemd boots, and build the container;
#                     needs root, debhelper, debootstrap, systemd-container, podman and runc
#   make fuzz         run the tests with generated requests for minutes; FUZZ_EXAMPLES sets how many
#   make lint         ruff and mypy
#   make bench        measure, side by side with other programs; needs wrk; BENCH_ROUNDS=7
#   make soak         keep the service busy and watch what grows; SOAK_MINUTES sets for how long
#   make pictures     take the README's pictures of the page and the terminal anew; needs what
#                     the tests of pages and make lab need
#   make man          write port-checker.1 anew, of what --help says
#   make provider-page  write the page on providers' software anew, of docs/golem-provider.md
#   make wheel        build dist/*.whl
#   make deb          build dist/*.deb for Debian 12 and 13; needs debhelper
#   make clean        delete all that these targets made

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Tests that run at the same time. More than two cores can do, since tests mostly wait: four processes
# have a lab each.
TEST_PROCESSES ?= 10
PYTEST_FLAGS ?=
COVERAGE_FLAGS ?=
FUZZ_EXAMPLES ?= 2000
# Kept between runs and between checkouts.
DEBIANS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/golem-port-checker/debian
DEBIAN_PACKAGES := systemd,systemd-sysv,dbus,python3,python3-venv,curl,iproute2,procps,nftables,redis-server
SOAK_MINUTES ?= 2
BIN := $(VENV)/bin
PYTEST ?= $(BIN)/pytest
IN_PROCESSES = $(PYTEST) --numprocesses $(TEST_PROCESSES)
PIP ?= $(BIN)/python -m pip --quiet --disable-pip-version-check
# Most modules of what is installed are never imported: Python compiles the others when they are.
INSTALL := $(PIP) install --no-compile --constraint $(CONSTRAINTS)

.PHONY: run test test-lowest cover coverage lab systemd-test fuzz lint bench soak pictures man \
    provider-page wheel deb clean
.DELETE_ON_ERROR:
# The tests start many interpreters, each of which would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

run: $(VENV)/run.stamp
	@$(BIN)/port-checker

test: $(VENV)/test.stamp
	@$(IN_PROCESSES) $(PYTEST_FLAGS)

# In a virtual environment of its own.
test-lowest:
	@$(MAKE) --no-print-directory test VENV=$(VENV)-lowest CONSTRAINTS=$(VENV)-lowest/constraints.txt

cover: PYTEST = $(BIN)/coverage run --branch -m pytest
cover: $(VENV)/dev.stamp
	@$(BIN)/coverage erase
	@$(IN_PROCESSES) $(PYTEST_FLAGS)
	@$(MAKE) --no-print-directory coverage

coverage:
	@$(BIN)/python .ci/half_written.py
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report $(COVERAGE_FLAGS)

systemd-test: $(VENV)/dev.stamp $(DEBIANS)/bookworm $(DEBIANS)/trixie
	@SYSTEMD_TEST_DEBIANS=$(DEBIANS) $(IN_PROCESSES) $(PYTEST_FLAGS) tests/systemd

# The tests work on copies, so each is made once.
$(DEBIANS)/%:
	@echo "Making a Debian in $@ ..."
	@mkdir -p $(@D)
	@rm -rf $@.part
	@debootstrap --variant=minbase --include=$(DEBIAN_PACKAGES) $* $@.part >$@.log
	@mv $@.part $@

lab: $(VENV)/test.stamp
	@$(BIN)/pytest tests/lab

fuzz: $(VENV)/dev.stamp
	@FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest tests/api/test_fuzz.py tests/api/test_openapi.py

lint: $(VENV)/dev.stamp
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(VENV)/dev.stamp
	@$(BIN)/python -m benchmarks $(BENCH_ROUNDS)

soak: $(VENV)/dev.stamp
	@$(BIN)/python -m benchmarks.soak $(SOAK_MINUTES)

pictures: $(VENV)/dev.stamp
	@PICTURES=$(CURDIR)/docs $(BIN)/pytest tests/browser tests/lab -k pictures

man: $(VENV)/run.stamp
	@$(BIN)/python .ci/man_page.py > port-checker.1.new && mv port-checker.1.new port-checker.1

provider-page: $(VENV)/test.stamp
	@$(BIN)/python .ci/provider_page.py > port_checker/api/web/golem-provider.html.new
	@mv port_checker/api/web/golem-provider.html.new port_checker/api/web/golem-provider.html

wheel: | $(BIN)/python
	@$(PIP) wheel --no-deps --wheel-dir dist .
	@ls dist/*.whl

deb: | $(BIN)/python
	@DEB_RULES_REQUIRES_ROOT=no debian/rules clean binary PYTHON=$(abspath $(BIN)/python)
	@ls dist/*.deb

clean:
	rm -rf $(VENV) $(VENV)-* build dist .benchmarks .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Python 3.11 or later is needed; choose one with make PYTHON=python3.11.")'
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@# The latest takes half the time of older ones.
	@$(PIP) install --upgrade pip

$(VENV)/constraints.txt: pyproject.toml constraints.txt .ci/lowest_versions.py | $(BIN)/python
	@$(BIN)/python .ci/lowest_versions.py >$@

$(VENV)/run.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/test.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/run.stamp

$(VENV)/dev.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/test.stamp $(VENV)/run.stamp
