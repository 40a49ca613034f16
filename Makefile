# Thin wrappers: every target is one command in the environment that the first line of a target sets up.
#   make train ARGS="training.steps=200"

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test test-all lint clean

train: .venv/installed
	$(BIN)/flashmoe train quickstart $(ARGS)

test: .venv/installed
	$(BIN)/pytest -m "not slow" $(ARGS)

test-all: .venv/installed
	$(BIN)/pytest $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The constraints reach pip's isolated builds too when they come from the environment.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or later is needed, found {sys.version.split()[0]}; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[torchtitan,dev]'
	@touch $@

clean:
	rm -rf .venv build dist outputs
