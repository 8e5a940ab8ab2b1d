# `make bench` and `make test` need Python >= 3.11 (with headers and venv), gcc and make; the rest they fetch themselves.
#
# How builds are kept apart: nothing is built in place. Every flavour (release, debug, sanitize) and every interpreter
# has a virtual environment of its own, the package is installed there (not as an editable), and pytest is run so that
# the installed package is found and the source tree is not (PYTHONSAFEPATH here, --pyargs and importlib in pyproject).
# PTEBATCH_DEBUG=1 and PTEBATCH_SANITIZE=1 choose flavour and environment for any target; tests/test_setup.py checks that
# the tests see the build they asked for.

SHELL  = /bin/sh
PYTHON ?= python3
ARGS   ?=

on       = $(filter-out 0,$(1))
FLAVOUR := $(or $(subst $() $(),-,$(strip $(if $(call on,$(PTEBATCH_DEBUG)),debug) $(if $(call on,$(PTEBATCH_SANITIZE)),sanitize))),release)
VENV    ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(patsubst -%,%,$(subst /,-,$(PYTHON))))$(patsubst %,-%,$(filter-out release,$(FLAVOUR)))
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The directory is listed too: its time changes when a file is removed.
SOURCES := setup.py pyproject.toml ptebatch $(wildcard $(addprefix ptebatch/*.,py pyi pyx h) ptebatch/py.typed)

unexport PYTHONPATH PYTHONHOME

.PHONY: help bench benchmarks test gate test-all lint debug check install clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="..." is passed on by bench, benchmarks, test and gate; PYTHON=python3.12 chooses the interpreter.'

bench: $(VENV)/.installed  ## single-PTE, batched and naive copying side by side, on synthetic and real page tables
	@$(BIN)/ptebatch bench $(ARGS)

test: $(VENV)/.installed  ## the test suite
	@PYTHONSAFEPATH=1 $(BIN)/python -m pytest $(ARGS)

gate: $(VENV)/.installed  ## did the engine change? counts, instructions, time (ARGS="--base REV"), ratios
	@$(BIN)/ptebatch gate $(ARGS)

benchmarks: $(VENV)/.installed  ## pytest-benchmark cases of every primitive (ARGS="--size 1GiB -k fork")
	@PYTHONSAFEPATH=1 $(BIN)/python -m pytest benchmarks/ --benchmark-enable --benchmark-sort=name -q $(ARGS)

debug:  ## the suite on the bounds-checked build, few Hypothesis examples
	@PTEBATCH_DEBUG=1 HYPOTHESIS_PROFILE=small $(MAKE) --no-print-directory test

test-all:  ## every interpreter on this machine, debug build, SIMD levels, sanitizers (PYTHONS="..." adds interpreters)
	@PYTHON='$(PYTHON)' MAKE='$(MAKE)' bash tools/test-all

lint: $(VENV)/.linters  ## ruff, cython-lint, mypy
	@PATH="$(BIN):$$PATH"; failed=0; \
	ruff check . || failed=1; cython-lint ptebatch/*.pyx || failed=1; mypy || failed=1; exit $$failed

install: $(VENV)/.installed  ## build and install into the virtual environment

check:  ## is everything there that a build needs?
	@$(CHECK)
	@echo "ptebatch: everything a build needs is here"

clean:  ## remove builds, virtual environments and caches
	rm -rf build dist *.egg-info ptebatch/*.so .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find ptebatch tests -name __pycache__ -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------------------------------

# One line per thing that is missing, naming the package to install; a distribution's package is called after its python.
define CHECK
no() { echo "ptebatch: $$1" >&2; exit 1; }; \
name=$(notdir $(PYTHON)); \
$(PYTHON) -c '' 2>/dev/null || no "$(PYTHON) does not run: install Python 3.11 or newer (apt-get install $$name), or name one: make PYTHON=python3.12"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || no "$(PYTHON) is older than 3.11: install a newer one and name it: make PYTHON=python3.12"; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || no "Python's venv module is missing: apt-get install $$name-venv"; \
cc=$$($(PYTHON) -c 'import os, sysconfig; print(os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc")'); \
command -v $${cc%% *} >/dev/null || no "the C compiler $${cc%% *} is missing: apt-get install gcc libc6-dev"; \
echo '#include <stdlib.h>' | $$cc -E -x c - >/dev/null 2>&1 || no "the C library's headers are missing: apt-get install libc6-dev"; \
include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
test -f "$$include/Python.h" || no "Python's headers are missing ($$include/Python.h): apt-get install $$name-dev"
endef

# The stamp is as old as the start of the build, so that a file saved meanwhile is not missed. When what decides how to
# compile changes (or the environment is new), the build tree goes; otherwise only its Python files, which may be stale.
$(VENV)/.installed: $(SOURCES)
	@$(CHECK)
	@$(BIN)/python -c '' 2>/dev/null || { echo "ptebatch: creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@touch $@.start
	@rm -rf $(if $(filter setup.py pyproject.toml,$?),build/$(FLAVOUR),build/$(FLAVOUR)/lib*/ptebatch/*.py*)
	@echo "ptebatch: installing the $(FLAVOUR) build into $(VENV)"
	@$(PIP) '.[test]'
	@mv $@.start $@

# Beside the package, because mypy reads the types of what it imports.
$(VENV)/.linters: pyproject.toml | $(VENV)/.installed
	@echo "ptebatch: installing the linters into $(VENV)"
	@$(PIP) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lint"])')
	@touch $@
