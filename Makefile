# Everything happens in .venv; nothing outside this folder changes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test exact slow second lint types contracts shapes docs notebooks clean

run: .venv/.installed
	$(BIN)/reflowlens run reflow-nano all

# A file stays with one worker: its fixtures are made once.
test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile \
		-rs --durations=25

# Results may not depend on the instructions that this processor has: equality is tested with AVX2 alone and without it.
EXACT := $(BIN)/python -m pytest -q -m "exact and not slow" --numprocesses auto --maxprocesses 4 --dist loadfile
exact: .venv/.dev
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(EXACT)
	ATEN_CPU_CAPABILITY=default $(EXACT)

# Shapes in annotations, of what the tests of models, interventions and activations call; torch.compile has no room for it.
shapes: .venv/.dev
	REFLOWLENS_SHAPES=1 $(BIN)/python -m pytest -q -m "not slow" -k "not compiled" --numprocesses auto --maxprocesses 4 \
		--dist loadfile tests/reflowlens/models tests/reflowlens/interventions tests/reflowlens/activations

slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

# Of these what CI runs: processes that fail, long pages of the manual.
second: .venv/.dev
	$(BIN)/python -m pytest -m "slow and not by_hand" --numprocesses auto --maxprocesses 4 --dist loadfile -rs --durations=10

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.dev
	$(BIN)/mypy

# Who may import whom: [tool.importlinter] in pyproject.toml.
contracts: .venv/.dev
	$(BIN)/lint-imports

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Executes them in full, minutes, and writes them back with their outputs.
notebooks: .venv/.dev
	$(BIN)/python -m notebooks.execute

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	touch $@

.venv/.docs: .venv/.installed
	$(PIP) --editable '.[docs]'
	touch $@
