# The two commands of the README: `make demo` and `make check`. Both set up what they need in .venv.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
# The first of these that is Python 3.11 or 3.12; PYTHON=/path/to/python names another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do "$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
DEMO_ARGS ?=

# A bare `pip install torch` brings gigabytes of CUDA on Linux, so there the CPU build is asked for by its own version:
# first where pip's own configuration looks, then at PyTorch. TORCH_INDEX=URL names another index, and whatever build
# it has is taken.
ifdef TORCH_INDEX
INSTALL_TORCH = $(PIP) install -q --extra-index-url "$(TORCH_INDEX)" "torch==$(TORCH_VERSION)"
else ifeq ($(shell uname -s),Linux)
CPU_INDEX := https://download.pytorch.org/whl/cpu
CPU_TORCH := "torch==$(TORCH_VERSION)+cpu"
INSTALL_TORCH = $(PIP) install -q $(CPU_TORCH) 2>/dev/null || $(PIP) install -q --extra-index-url $(CPU_INDEX) $(CPU_TORCH)
else
INSTALL_TORCH = $(PIP) install -q "torch==$(TORCH_VERSION)"
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

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests --ignore=tests/benchmarks

bench: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

# Debian's python3 may come without ensurepip: then its pip installs itself into the environment.
$(VENV)/.ready-torch: constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(FITS)' || \
	  { echo "Python 3.11 or 3.12 is needed: name it, make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): a few minutes"
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(INSTALL_TORCH)
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready-torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.ready-demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
