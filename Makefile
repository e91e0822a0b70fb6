# `make` alone lists what there is. Needed beforehand: make and Python 3.11 or newer.

PYTHON ?= python3
# Tests wait more than they work; each process has servers of its own.
PROCESSES ?= 2
BIN := .venv/bin
# The order of the tests and what they choose at random follow from it: make test SEED=7 repeats a run.
SEED := $(or $(SEED),$(shell od -An -N3 -tu4 /dev/urandom | tr -d ' '))
PYTEST := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal \
  --randomly-seed=$(SEED) --hypothesis-seed=$(SEED)
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
VENV := $(UV) venv --quiet --python $(PYTHON) .venv
PIP_INSTALL := $(UV) pip install --quiet --python $(BIN)/python
else
VENV := $(PYTHON) -m venv .venv
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-faults test-unit soak check format coverage bench bench-quick migration lock clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | awk -F '\t' '{printf "make %-12s %s\n", $$1, $$2}'

install: .venv/.installed ## Everything into .venv, by the hashes of requirements.txt; leaves .venv/bin/pipeline

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/it")'
	test -x $(BIN)/python || $(VENV)
	$(PIP_INSTALL) --require-hashes -r requirements.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

demo: install ## A day at a broker, from Kafka into tables worth querying; nothing to set up
	$(BIN)/pipeline demo

test: check ## `make check`, then the core of every promise and all quick tests, on real servers
	$(PYTEST) -m "not benchmark and (core or not faults)"

test-faults: install ## All other tests: faults, odd surroundings, five minutes of soak
	$(PYTEST) -m "not benchmark and faults and not core"

test-unit: install ## The tests that need no server; seconds
	$(BIN)/python -m pytest tests/unit

soak: install ## Everything at once under random faults, then judged: make soak MINUTES=60 SEED=7
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),5) --seed $(SEED)

check: install ## Format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install ## Format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

coverage: install ## All tests, with the lines and branches that none of them reaches
	$(BIN)/python -m pytest --cov

bench: install ## Measure beside the bare statements and what one could pick instead, into benchmarks/results.md; hours
	$(PIP_INSTALL) --require-hashes -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks --write

bench-quick: install ## The same with small numbers and no rivals, to see that it works
	$(BIN)/python -m benchmarks --quick

migration: install ## A migration for new tables of the log or bookkeeping: make migration name="add fees"
	@test -n "$(name)" || { echo 'Say what it does: make migration name="add fees"' >&2; exit 2; }
	$(BIN)/python -m tests.new_migration "$(name)"

lock: install ## Resolve the dependencies of pyproject.toml again; pins stay where they can
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-strip-extras \
	  --custom-compile-command 'make lock' --quiet --output-file requirements.txt
	for pins in benchmarks/requirements.in benchmarks/rivals/*/requirements.in; do \
	  $(BIN)/uv pip compile $$pins --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-emit-find-links --no-annotate --no-strip-extras \
	    --custom-compile-command 'make lock' --quiet --output-file $${pins%.in}.txt || exit 1; \
	done

clean: ## Remove what the tools made; .venv stays
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* htmlcov build dist
