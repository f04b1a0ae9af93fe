# Every command a person or CI runs. Needs make and Python 3.11 or newer; everything else is installed into .venv.
#
#   make PYTHON=python3.12 ...        another Python for .venv
#   make gpu-check GPU_PYTHON=...     the Python that holds a CUDA build of PyTorch and this package

PYTHON ?= python3
GPU_PYTHON ?= python3
BENCH_FLAGS ?=
DATA ?= ../shared/data
WORK ?= .train-default
MINUTES ?= 70
TRAIN_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# On Linux plain PyPI has CUDA builds only. An exact +cpu version can never bring one in, whatever the index.
TORCH := 2.13.0
TORCH_CPU := torch==$(TORCH)$(if $(filter Linux,$(shell uname -s)),+cpu)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL_TORCH = $(PIP) install --no-deps --only-binary :all: '$(TORCH_CPU)'
HAS_CPU_TORCH := import torch; assert torch.version.cuda is None and torch.__version__.split("+")[0] == "$(TORCH)"

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format docs bench soak train-default gpu-check gpu-bench cuda clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "  %-13s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with PyTorch's CPU build and everything the demo and the tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: PYTHON=$(PYTHON) is no Python 3.11 or newer; name one that is: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@test -x $(BIN)/python || { echo "setup: making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); } || { \
		rm -rf $(VENV); \
		echo "make: 'python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
	@$(BIN)/python -c '$(HAS_CPU_TORCH)' 2>/dev/null || { \
		echo "setup: installing $(TORCH_CPU)"; \
		$(INSTALL_TORCH) --index-url $(TORCH_CPU_INDEX) --retries 1 --timeout 20 2>/dev/null || $(INSTALL_TORCH); \
	} || { \
		echo "make: no $(TORCH_CPU) from $(TORCH_CPU_INDEX) nor from pip's own settings." >&2; \
		echo "make: name a mirror (make TORCH_CPU_INDEX=URL) or a folder with the wheel (PIP_FIND_LINKS=FOLDER make)." >&2; \
		exit 1; }
	@echo "setup: installing msa-memory and its development tools"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c '$(HAS_CPU_TORCH)' || { \
		echo "make: $(VENV) has another PyTorch than the CPU build of $(TORCH): make clean, and try again" >&2; \
		exit 1; }
	@touch $@
	@echo "setup: done"

demo: setup ## build, question, change and reopen a memory of real documents (examples/quickstart.py)
	@$(BIN)/python examples/quickstart.py

test: lint types ## lint, types and every test that needs no GPU and ends within minutes
	@echo "test: pytest"
	@$(BIN)/pytest -m 'not gpu and not soak'

lint: setup ## ruff check and ruff format --check
	@echo "lint: ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { \
		$(BIN)/ruff format --check --output-format concise . >&2; \
		echo "make: 'make format' formats them" >&2; \
		exit 1; }

# mypy cannot follow the editable install's import hook, so it reads a copy installed under build/.
# build/ goes first: setuptools would add a deleted module that it finds there to the copy.
types: setup ## mypy --strict over the package
	@echo "types: mypy"
	@rm -rf build
	@$(PIP) install --no-deps --no-build-isolation --no-compile --target build/typecheck .
	@MYPYPATH=build/typecheck $(BIN)/mypy -p msa_memory

format: setup ## let ruff fix and format the code
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

docs: setup ## write docs/reference.md from the docstrings
	@$(BIN)/python docs/reference.py

bench: setup ## run every benchmark on the CPU (BENCH_FLAGS are passed on)
	@set -e; for script in benchmarks/bench_*.py; do \
		echo "bench: $$script"; $(BIN)/python "$$script" $(BENCH_FLAGS); done

soak: setup ## run the tests that take long on purpose
	@$(if $(MSA_TEST_POSTGRES_URL),,.ci/with-postgres) $(BIN)/pytest -m soak --timeout 0

# On a GPU: make train-default MINUTES=9 TRAIN_FLAGS='--device cuda'
train-default: setup ## make the default model's files; call it again while it exits with 3
	@$(BIN)/msa-memory train default --data $(DATA) --work $(WORK) --minutes $(MINUTES) $(TRAIN_FLAGS)

# The GPU targets never touch .venv, which holds a CPU build: they use the machine's own PyTorch.
gpu-check: cuda ## run the tests that need a CUDA device; fails where there is none
	@timeout 590 $(GPU_PYTHON) -P -m pytest -m gpu

gpu-bench: cuda ## run every benchmark with --device cuda
	@set -e; for script in benchmarks/bench_*.py; do \
		echo "gpu-bench: $$script"; timeout 590 $(GPU_PYTHON) "$$script" --device cuda $(BENCH_FLAGS); done

cuda:
	@$(GPU_PYTHON) -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "make: GPU_PYTHON=$(GPU_PYTHON) has no PyTorch that sees a CUDA device; name one that does" >&2; \
		exit 1; }
	@$(GPU_PYTHON) -P -c 'import msa_memory.engine, pytest' || { \
		echo "make: GPU_PYTHON=$(GPU_PYTHON) lacks this package: $(GPU_PYTHON) -m pip install -e '.[dev]'" >&2; \
		exit 1; }

clean: ## remove .venv and everything built; memories and cached models stay
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
