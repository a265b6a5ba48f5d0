# make demo: install and show; make test: what a change must pass. Each target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CORE := $(VENV)/.stamp-core
DEV := $(VENV)/.stamp-dev

.PHONY: demo test docs gpu bench quickstart clean

demo: $(CORE)
	$(BIN)/remanence demo

# One thread per worker: two pytest workers share the cores, and more threads than cores is slower.
test: export OMP_NUM_THREADS = 1
test: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2

docs: $(DEV)
	$(BIN)/python tools/make_docs.py

gpu: $(DEV)
	$(BIN)/remanence doctor
	$(BIN)/python -m pytest -m gpu
	$(BIN)/remanence bench speed --device cuda --json results/gpu.json

bench: $(DEV)
	$(BIN)/remanence bench speed --lengths 512,2048,8192 --json results/speed.json --plot results/speed.png

quickstart: $(CORE)
	$(BIN)/remanence train quickstart --out runs/quickstart

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that no other package's requirement picks another build of it.
$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -e . -c constraints.txt
	touch $@

$(DEV): $(CORE)
	$(PIP) install -e ".[dev]" -c constraints.txt
	touch $@
