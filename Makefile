# make quickstart    the whole path, from raw text to a served answer, on this machine, with a real model
# make models        fetch that model (93 MB) and convert it, once, into models/; the quickstart does it by itself
# make test          what every change must pass: lint, types, tests (without the slow ones)
# make test-all      the slow tests too
# make gpu-check     on a machine with a GPU: every test of one, and the speed tables, as one table to paste back
# make install       .venv with everything, at the versions of the lock file (the two above do it by themselves)
# make lint | format | types | clean
#
# PYTHON=python3.12       another interpreter (3.11 or newer)
# WORKERS=4               tests in so many processes at a time (2; each takes up to 2 GB; 0: in pytest's own)
# PIP_EXTRA_INDEX_URL=URL      an index with the small CPU build of torch, where you reach one

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# onnxruntime-gpu where there is an NVIDIA driver; the two wheels must never share an environment.
HAS_GPU := $(or $(wildcard /proc/driver/nvidia/version),$(shell command -v nvidia-smi))
LOCK := $(if $(HAS_GPU),requirements-gpu.lock,requirements.lock)

# -qq keeps pip's notes about mirrors and caches away; errors still show.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
export DS_BUILD_OPS := 0
# As the commands set it for themselves (launch/politeness.py): threads that wait sleep, so two jobs can share a machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Tests that start groups of processes share one launch a mode and watch time limits: they come first, alone. The others
# run file by file in WORKERS processes, or one after the other where that is 0.
WORKERS ?= 2
define TESTS
	$(BIN)/pytest tests/distributed -m $(1)
	$(BIN)/pytest --ignore=tests/distributed -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m $(1)
endef

.PHONY: quickstart models install test test-all gpu-check lint format types clean
.DELETE_ON_ERROR:

quickstart: install
	$(BIN)/trivet quickstart

models: install
	$(BIN)/python -m launch.pretrained

install: $(INSTALLED)

$(INSTALLED): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Trivet needs Python 3.11 or newer, this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@echo "[1/3] torch, into $(VENV) (the longest step)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install "$$(grep '^torch==' $(LOCK))"
	@echo "[2/3] $$(grep -c == $(LOCK)) packages of $(LOCK)"
	@$(PIP) install -r $(LOCK)
	@echo "[3/3] trivet"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
	@echo "Installed: try $(BIN)/trivet --help, or $(BIN)/trivet doctor"

test: install lint types
	$(call TESTS,"not slow and not gpu")

test-all: install lint types
	$(call TESTS,"not gpu")

gpu-check: install
	@$(BIN)/python benchmarks/gpu_check.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
