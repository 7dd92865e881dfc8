# Each target sets up what it needs in .venv, once. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test test-slow check bench performance simulate clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

run: .venv/.run ## serve the embedded model, or MODEL=folder-or-hub-name
	$(BIN)/python -m server serve $(MODEL) $(ARGS)

test: .venv/.test ## the tests that fit in a coffee break
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: .venv/.test ## the long ones
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

check: .venv/.test ## ruff, mypy strict, the rules of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

bench: .venv/.test ## three minutes of benchmarks on the embedded model
	$(BIN)/python -m benchmarks

performance: .venv/.test ## docs/performance.md from the results that were kept
	$(BIN)/python -m benchmarks.page

simulate: .venv/.test ## a million requests through the simulated engine, an hour
	$(BIN)/python -m benchmarks.simulate $(ARGS)

clean: ## remove what the other targets made
	rm -rf .venv build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit(f"Kvist needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Kvist into .venv (once; a minute or two)"
	$(PIP) --editable .
	@touch $@

.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Kvist and its test tools into .venv (once; a minute or two)"
	$(PIP) --editable '.[test]'
	@touch $@ .venv/.run
