# The two commands of the README: `make demo` and `make check`. Both set up what they need in .venv.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
# The first of these that is Python 3.11 or 3.12; PYTHON=/path/to/python names another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do "$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
DEMO_ARGS ?=
# Test processes: two where there are two processors.
WORKERS ?= $(shell test "$$(getconf _NPROCESSORS_ONLN)" -ge 2 && echo 2 || echo 0)

# A bare `pip install torch` brings gigabytes of CUDA on Linux, so there the CPU build is asked for by its own version:
# first where pip's own configuration looks, then at PyTorch. TORCH_INDEX=URL names another index, and whatever build
# it has is taken.
TORCH := $(PIP) install -q -c constraints.txt torch==$(TORCH_VERSION)
ifdef TORCH_INDEX
INSTALL_TORCH = $(TORCH) --extra-index-url "$(TORCH_INDEX)"
else ifeq ($(shell uname -s),Linux)
INSTALL_TORCH = $(TORCH)+cpu 2>/dev/null || $(TORCH)+cpu --extra-index-url https://download.pytorch.org/whl/cpu
else
INSTALL_TORCH = $(TORCH)
endif

.PHONY: demo check setup setup-dev lint types layers test bench clean

demo: $(VENV)/.ready-demo
	$(BIN)/fedpact demo $(DEMO_ARGS)

check: lint types test

setup: $(VENV)/.ready-demo
setup-dev: $(VENV)/.ready-dev

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

layers: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

# Two at a time: whole federations, and everything else (tests/conftest.py). WORKERS=0 runs one after the other.
test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests --ignore=tests/benchmarks --numprocesses=$(WORKERS) --no-loadscope-reorder

bench: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

# Debian's python3 may come without ensurepip: then its pip installs itself into the environment.
$(VENV)/.ready-torch: constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(FITS)' || \
	  { echo "Python 3.11 or 3.12 is needed: name it, make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): a few minutes"
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(INSTALL_TORCH) || { echo "No torch $(TORCH_VERSION) to be had: name an index, make TORCH_INDEX=URL"; exit 1; }
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready-torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.ready-demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
