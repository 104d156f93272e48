# The two commands of the README: `make demo` and `make check`. Both set up what they need in .venv.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
# Where the CPU build of torch comes from when pip's own configuration does not offer one.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_ARGS ?=

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

$(VENV)/.ready-torch: constraints.txt
	command -v $(PYTHON) >/dev/null 2>&1 || { echo "Python 3.11 is needed: give it as PYTHON=/path/to/python3.11"; exit 1; }
	# Debian's python3 comes without ensurepip: then pip installs itself into the environment.
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || \
	  { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	# On Linux the CPU build, by its own version: a bare torch would bring gigabytes of CUDA.
	if [ "$$(uname -s)" = Linux ]; then \
	  $(PIP) install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
	  $(PIP) install -q --index-url $(TORCH_INDEX) --extra-index-url https://pypi.org/simple "torch==$(TORCH_VERSION)+cpu"; \
	else $(PIP) install -q "torch==$(TORCH_VERSION)"; fi
	touch $@

$(VENV)/.ready-demo: $(VENV)/.ready-torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.ready-demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
