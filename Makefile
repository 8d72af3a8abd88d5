# Needs make and Python 3.10 or newer; all else is installed into .venv on first use.
#   make demo PYTHON=/usr/bin/python3.12     another interpreter
#   make test PYTEST_ARGS="-k fold -x"       part of the tests

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-newest lint gpu-check wheel docs lock clean

VENV := .venv
BIN := $(VENV)/bin
# The demo installs what it needs; all else adds what developing needs.
FOR_DEMO := $(VENV)/.for-demo
FOR_DEV := $(VENV)/.for-dev
DEMO_EXTRAS := prune,export,cpu
DEV_EXTRAS := $(DEMO_EXTRAS),dev
# Which versions: what was tested.
VERSIONS := -c constraints.txt
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
# Earlier releases of transformers, whose tests test-all runs too; the first is the least in pyproject.toml.
TRANSFORMERS := 5.20.2 5.23.0
LOCK_PYTHONS ?= python3.10 python3.11
PYTEST_ARGS ?=
GPU_ARGS ?=
# One process per core, at most four, with one thread each: tests are too small for more threads, and processes that each
# take all cores slow each other down. Whoever is done takes work from the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The first interpreter that runs at all (a version manager's shim may not) and is new enough.
ifndef PYTHON
PYTHON := $(shell for name in python3.11 python3 python3.12 python3.13 python3.10; do \
  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$$name"; break; }; done)
endif

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(FOR_DEMO) ## Prune the bundled model to 65 % of its MACs; the report is runs/demo/report.html
	$(BIN)/vpruner run --target 0.65 -o runs/demo --force

test: lint ## Check the style, then run the tests
	$(PYTEST) $(PYTEST_ARGS)

test-all: lint $(TRANSFORMERS:%=.transformers/%/.installed) ## The same, with the full products that the tests sample
	$(PYTEST) -m "" $(PYTEST_ARGS)

test-newest: ## The tests with the newest version of everything, installed into .venv-newest
	@rm -f .venv-newest/.for-dev
	$(MAKE) test VENV=.venv-newest VERSIONS='--upgrade --upgrade-strategy eager'

lint: $(FOR_DEV) ## Check the style alone
	$(BIN)/ruff check .

# What is missing (TensorRT, onnxruntime's CUDA provider) is skipped and named. Without a GPU it ends with exit code 2.
gpu-check: $(FOR_DEV) ## On a machine with an NVIDIA GPU: results and times there, in at most 8 minutes
	$(BIN)/python benchmarks/gpu/check.py $(GPU_ARGS)

wheel: $(FOR_DEV) ## Build sdist and wheel into dist/
	@rm -rf build
	$(BIN)/python -m build --no-isolation --outdir dist .

docs: $(FOR_DEV) ## Write what is generated in README.md and docs/: commands, tables, models, versions
	$(BIN)/python benchmarks/render.py

lock: ## Write the newest versions into constraints.txt, for Python 3.10 and 3.11
	$(PYTHON) .ci/lock.py $(LOCK_PYTHONS)

clean: ## Remove all environments and everything that was built; runs/ stays
	rm -rf .venv .venv-newest .transformers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .test-store

# The stamps come last: whatever stops the set-up half-way, the next make does it again. An environment that does not
# answer (interrupted, or its interpreter is gone) is made anew. setuptools comes first and builds without isolation:
# an isolated build would take the newest there is.
define install
	@test -n "$(PYTHON)" || { echo "vpruner needs Python 3.10 or newer; none found. Try: make PYTHON=/path/to/python3" >&2; exit 1; }
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  echo "Making $(VENV) with $$($(PYTHON) --version)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); fi
	@echo "Installing vpruner[$(1)] into $(VENV): several minutes the first time, most of them for PyTorch"
	@$(PIP) install $(VERSIONS) setuptools
	@$(PIP) install $(VERSIONS) --no-build-isolation -e '.[$(1)]'
endef

$(FOR_DEMO): pyproject.toml constraints.txt
	$(call install,$(DEMO_EXTRAS))
	@touch $@

$(FOR_DEV): pyproject.toml constraints.txt
	$(call install,$(DEV_EXTRAS))
	@touch $(FOR_DEMO) $@

.transformers/%/.installed: | $(FOR_DEV)
	@echo "Installing transformers $* into .transformers/$*"
	@$(PIP) install --no-deps --target .transformers/$* transformers==$*
	@touch $@
