# The targets need nothing but python3 with pip: they make .venv, install the package into it, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More real images for the demo, if there are any: a parquet file in the schema of the Hub's uoft-cs/cifar10.
CIFAR10 ?= $(wildcard ../shared/data/cifar10-train.parquet)

.PHONY: demo test zoo clean

demo: $(VENV)/.installed
	$(BIN)/timm-ghn demo --output build/demo.png $(if $(CIFAR10),--data $(CIFAR10))

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Every architecture of timm; benchmarks/results holds the result of a whole run.
zoo: $(VENV)/.installed
	$(BIN)/timm-ghn zoo --workers $(shell nproc) --output build/zoo

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
