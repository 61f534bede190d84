# Needs Python 3.11+, git and make. `make demo` shows what retex does, `make test` checks all of it.

VENV   ?= .venv
PYTHON ?= python3
SUITE  ?= text4
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo suite test test-slow check lint types docs clean

help:
	@echo "make demo [SUITE=text4|text8|vision6]  real experts merged into one checkpoint and brought back"
	@echo "make test                      lint, types, docs freshness, tests"
	@echo "make test-slow                 the tests that take minutes, too"
	@echo "make check                     lint, types, docs freshness"
	@echo "make docs                      write the generated pages"
	@echo "make suite SUITE=text8         only the experts of a suite, kept in the cache"
	@echo "make clean                     remove environments, caches and .demo/"

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --suite $(SUITE)

suite: $(VENV)/.installed
	$(BIN)/python examples/demo.py --suite $(SUITE) --experts-only

test: check
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: lint types $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py --check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e '.[image]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf .venv .ci-venv .demo build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
