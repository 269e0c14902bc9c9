# What a person does with this repository; `make` prints it.
# Each target installs what it needs, once: the stamps in .venv are newer than pyproject.toml, constraints.txt and the
# native kernels' sources.

PYTHON ?= python3
VENV := .venv
PROTOS_VENV := .venv-protos
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --constraint constraints.txt

NATIVE := kernels/meshlm/kernels/native
RUN_STAMP := $(VENV)/.installed-run
NATIVE_STAMP := $(VENV)/.installed-native
DEV_STAMP := $(VENV)/.installed-dev
PROTOS_STAMP := $(PROTOS_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo up test check check-native kernels protos bench model install clean
.DELETE_ON_ERROR:

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(NATIVE_STAMP) ## from nothing to a streamed, guarded, cached, traced answer of a real model
	@$(PY) -m meshlm.mesh.cli model fetch
	@$(PY) -m meshlm.mesh.cli demo

up: $(NATIVE_STAMP) ## run the mesh on this machine until Ctrl-C
	@$(PY) -m meshlm.mesh.cli model fetch
	@$(PY) -m meshlm.mesh.cli up

test: $(DEV_STAMP) model ## run the tests (those that need a GPU skip without one)
	$(PY) -m pytest

check: $(DEV_STAMP) $(PROTOS_STAMP) ## formatting, lint, types, who imports whom, the contract and its stubs
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	cd protos && ../$(VENV)/bin/buf lint
	@release=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null) || release=; \
	if [ -n "$$release" ]; then \
		echo "buf breaking against $$release"; \
		cd protos && ../$(VENV)/bin/buf breaking --against "../.git#tag=$$release,subdir=protos"; \
	else \
		echo "buf breaking: no release to compare with yet"; \
	fi
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	protos/generate.sh "$(CURDIR)/$(PROTOS_VENV)/bin/python" "$$fresh" && \
	diff -r -x __pycache__ "$$fresh" protos/gen || { echo "protos/gen is not what protos/ says: run 'make protos'"; exit 1; }

check-native: $(DEV_STAMP) ## the native kernels' tests with address and undefined-behaviour checks (needs g++)
	$(PY) -m meshlm.kernels.native.build --sanitize
	MESHLM_NATIVE_SANITIZED=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(PY) -m pytest tests/kernels/native

kernels: $(DEV_STAMP) ## compile every GPU kernel that serving runs, for sm_80, 86, 89, 90, 100 and 120, without a GPU
	$(PY) -m meshlm.kernels.gpu.compile

protos: $(PROTOS_STAMP) ## make the stubs in protos/gen anew
	protos/generate.sh "$(CURDIR)/$(PROTOS_VENV)/bin/python"

bench: $(DEV_STAMP) model ## run every benchmark for a short time
	@set -e; for benchmark in $$(grep -l __main__ benchmarks/*.py); do \
		echo "== $$benchmark"; $(PY) "$$benchmark" --quick; \
	done

model: $(RUN_STAMP) ## fetch the model that demo and tests run on
	@$(PY) -m meshlm.mesh.cli model fetch

install: $(DEV_STAMP) ## make .venv with everything for work on this repository

clean: ## remove .venv, .venv-protos, what was compiled and every tool's cache; fetched models stay
	rm -rf $(VENV) $(PROTOS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	rm -rf $(NATIVE)/_native_* $(NATIVE)/_build_*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "MeshLM needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)."; exit 1; }

# torch comes first and by this one spec: asked for in any other way, some indexes add gigabytes of CUDA.
$(RUN_STAMP): pyproject.toml constraints.txt hatch_build.py | $(PY)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[worker,local]'
	@touch $@

$(NATIVE_STAMP): $(RUN_STAMP) $(NATIVE)/build.py $(wildcard $(NATIVE)/src/*)
	@$(PY) -m meshlm.kernels.native.build
	@touch $@

$(DEV_STAMP): $(RUN_STAMP) | $(NATIVE_STAMP)
	$(PIP) --editable '.[worker,local,dev,test]'
	@touch $@

$(PROTOS_STAMP): protos/requirements.txt | $(PY)
	$(PY) -m venv $(PROTOS_VENV)
	$(PROTOS_VENV)/bin/python -m pip --disable-pip-version-check install -r protos/requirements.txt
	@touch $@
