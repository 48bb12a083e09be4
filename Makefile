# Everything lives in .venv, which needs nothing but Python 3.11 (or newer) and pip.
#   make demo          trains a small model for three minutes, has it complete code      make demo-llm  a real model answers
#   make test          the suite: minutes, no PyTorch      make test-all      with the slow tests and SmolLM2
#   make test-parity   against transformers, live          make lint          ruff and the direction of imports
#   make install       only sets up .venv                  make clean         removes all that was made here
# PYTHON picks the interpreter, PYTEST_ARGS adds to pytest's arguments (PYTEST_ARGS="-x -n0 -k cache").

PYTHON ?= python3
PYTEST_ARGS ?=

py := .venv/bin/python
pip_install := $(py) -m pip install --quiet --disable-pip-version-check
pytest := $(py) -m pytest -n auto --maxprocesses=8 --dist worksteal

.PHONY: install demo demo-llm test test-all test-parity lint clean

install: .venv/.installed-dev

# One stamp per set of packages: the demo does not wait for the development tools, nor the tests for PyTorch.
.venv/.installed-core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("jaxlm needs Python 3.11 or newer and \
	$(PYTHON) is " + sys.version.split()[0] + ": name another one, make PYTHON=python3.12 ...")'
	@echo "installing jaxlm into .venv ..."
	@$(PYTHON) -m venv .venv
	@$(pip_install) --editable '.[gguf]'
	@touch $@

.venv/.installed-dev: .venv/.installed-core
	@echo "installing the development tools into .venv ..."
	@$(pip_install) --editable '.[gguf,dev]'
	@touch $@

.venv/.installed-parity: .venv/.installed-dev
	@echo "installing transformers and torch into .venv ..."
	@$(pip_install) --editable '.[gguf,dev,parity]'
	@touch $@

demo: .venv/.installed-core
	@$(py) -m train.demo

demo-llm: .venv/.installed-core
	@$(py) -m infer.demo

test test-all test-parity: export JAX_PLATFORMS = cpu

# Tests compile far more than they compute; make test-all compiles as users do.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS = 1

test: .venv/.installed-dev
	$(pytest) -m "not slow and not real and not parity" $(PYTEST_ARGS)

test-all: .venv/.installed-dev
	$(pytest) -m "not parity" $(PYTEST_ARGS)

test-parity: .venv/.installed-parity
	$(pytest) -m parity $(PYTEST_ARGS)

lint: .venv/.installed-dev
	$(py) -m ruff check .
	.venv/bin/lint-imports --cache-dir .cache/importlinter

clean:
	rm -rf .venv .cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
