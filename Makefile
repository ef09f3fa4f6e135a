# make demo · make test: all that is needed is Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
PIP_AUDIT := 2.10.1

.PHONY: help install demo serve test test-long test-pgbouncer fuzz lint audit isolation format clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## .venv with the pgrecall command in it

demo: .venv/installed ## from nothing to a cited answer, then serve (ONCE=1: stop after the answer)
	@$(BIN)/pgrecall demo $(if $(ONCE),--once)

serve: .venv/installed ## serve the API on 127.0.0.1:8000
	@$(BIN)/pgrecall serve

test: .venv/installed-dev ## everything that guards a change
	$(BIN)/python -m pytest -n $(WORKERS) -m "not long"

test-long: .venv/installed-dev ## the long counts: fuzzing, kills
	THOROUGH=20 $(BIN)/python -m pytest -n $(WORKERS) --timeout 3600

PGBOUNCER ?= $(or $(shell command -v pgbouncer),/usr/sbin/pgbouncer)
PREPARED ?= 0

test-pgbouncer: .venv/installed-dev ## tests of API and database through PgBouncer (PGBOUNCER=program PREPARED=max_prepared_statements)
	PGRECALL_TEST_PGBOUNCER=$(PGBOUNCER) PGRECALL_TEST_PGBOUNCER_PREPARED=$(PREPARED) \
	  $(BIN)/python -m pytest -n $(WORKERS) -m "not long" tests/api tests/database

fuzz: .venv/installed-dev ## schemathesis over the whole API at length, with figures
	THOROUGH=$(or $(THOROUGH),50) $(BIN)/python -m pytest -s --timeout 7200 tests/hostile/test_fuzz.py

lint: .venv/installed-dev ## ruff, mypy, import-linter, alembic check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@data=$$(mktemp -d) && trap 'rm -rf "$$data"' EXIT && export PGRECALL_DATA_DIR="$$data/pg" && \
	  $(BIN)/pgrecall migrate && $(BIN)/alembic check

audit: .venv/python ## ask PyPI whether a package of constraints.txt has a known vulnerability (needs the network)
	@[ -x .venv/audit/bin/pip-audit ] || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/python -m pip --quiet --disable-pip-version-check install pip-audit==$(PIP_AUDIT); }
	@.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

isolation: .venv/installed ## write down what keeps tenants apart, after a new migration (app/isolation.json)
	@data=$$(mktemp -d) && trap 'rm -rf "$$data"' EXIT && PGRECALL_DATA_DIR="$$data/pg" $(BIN)/python migrations/isolation.py

format: .venv/installed-dev ## ruff format and the fixes it is sure of
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv and the embedded database
	rm -rf .venv .pgrecall build *.egg-info

.venv/python: 
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pgrecall needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.13")'
	@echo "installing into .venv (once)" >&2
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml constraints.txt
	@$(PIP) install --constraint constraints.txt --editable '.[local,files]'
	@touch $@

.venv/installed-dev: .venv/installed
	@$(PIP) install --constraint constraints.txt --editable '.[local,files,dev]'
	@touch $@
