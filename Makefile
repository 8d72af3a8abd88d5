# Needs make and Python 3.10 or newer; all else is installed into .venv on first use.
#   make demo PYTHON=/usr/bin/python3.12     another interpreter
#   make test PYTEST_ARGS="-m 'not slow' -x" part of the tests

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint gpu-check wheel clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := prune,export,cpu,dev
PYTEST_ARGS ?=
GPU_ARGS ?=
# One process per core, at most four, with one thread each: tests are too small for more threads, and processes that each
# take all cores slow each other down. Files stay together, so that what a file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The first interpreter that runs at all (a version manager's shim may not) and is new enough.
ifndef PYTHON
PYTHON := $(shell for name in python3.11 python3 python3.12 python3.13 python3.10; do \
  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$$name"; break; }; done)
endif

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## Prune the bundled model to 65 % of its MACs; the report is runs/demo/report.html
	$(BIN)/vpruner run --target 0.65 -o runs/demo --force

test: lint ## Check the style, then run every test
	$(PYTEST) $(PYTEST_ARGS)

lint: $(STAMP) ## Check the style alone
	$(BIN)/ruff check .

# What is missing (TensorRT, onnxruntime's CUDA provider) is skipped and named. Without a GPU it ends with exit code 2.
gpu-check: $(STAMP) ## On a machine with an NVIDIA GPU: results and times there, in at most 8 minutes
	$(BIN)/python benchmarks/gpu/check.py $(GPU_ARGS)

wheel: $(STAMP) ## Build sdist and wheel into dist/
	@rm -rf build
	$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## Remove .venv and everything that was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .test-store

# The stamp comes last: whatever stops the set-up half-way, the next make does it again. A .venv that does not answer
# (interrupted, or its interpreter is gone) is made anew.
# -qq: pip's progress and warnings stay out of the way; its errors do not.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "vpruner needs Python 3.10 or newer; none found. Try: make PYTHON=/path/to/python3" >&2; exit 1; }
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  echo "Making $(VENV) with $$($(PYTHON) --version)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); fi
	@echo "Installing vpruner[$(EXTRAS)] into $(VENV): several minutes the first time"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -e '.[$(EXTRAS)]'
	@touch $@
