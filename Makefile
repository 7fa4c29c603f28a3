# The README's commands. Each target makes the virtual environment that it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fast slow gpu check format bench docs clean

demo: $(VENV)/.runtime
	$(BIN)/carrara demo

test: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

fast: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/conditioning tests/extension tests/guidance \
		tests/networks tests/process tests/solvers tests/test_*.py

slow: $(VENV)/.development
	$(BIN)/python -m pytest -m slow

gpu: $(VENV)/.development
	$(BIN)/python -m pytest -m gpu tests/gpu

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.development
	for name in noise solvers_speed solvers_error evaluation unet training; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; \
	done

docs: $(VENV)/.development
	$(BIN)/pdoc --docformat google --output-directory build/docs carrara
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Carrara needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Carrara and what it needs into $(VENV) ..."
	$(PIP) --editable .
	touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(VENV)/.runtime
	@echo "installing what the tests need into $(VENV) ..."
	$(PIP) --editable ".[dev]"
	touch $@
