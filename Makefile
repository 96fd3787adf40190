# make demo   set up, then run the main job on real text (about ten minutes on two cores)
# make test   set up, then run the tests
# make record  time setup, test and demo in a fresh clone; keeps the figures
# make lint   formatting, lint and types
#
# PYTHON   the interpreter to build the environment from
# VENV     where the environment is
# PIP      further arguments of pip install, e.g. an index of CPU-only PyTorch builds:
#          make demo PIP="--extra-index-url URL"

PYTHON ?= python3
VENV ?= .venv
PIP ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A PyTorch with a working GPU that is already installed is used; otherwise one is installed.
GPU := $(shell $(PYTHON) -c "import torch; print('yes' if torch.cuda.is_available() else '')" 2>/dev/null)
TORCH ?= torch==2.13.0

.PHONY: setup demo test record lint format clean

setup: $(READY)

$(READY): pyproject.toml
	@echo "Setting up the environment in $(VENV) (some minutes the first time) ..." >&2
ifeq ($(GPU),yes)
	@$(PYTHON) -m venv --system-site-packages $(VENV)
else
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP) "$(TORCH)"
endif
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP) -e ".[cpu,demo,dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/python -m scripts.demo

test: $(READY)
	@$(BIN)/python -m pytest -q

record: $(READY)
	@$(BIN)/python -m scripts.record_commands

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
