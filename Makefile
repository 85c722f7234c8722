# Every target builds .venv by itself on a machine that has only python3 and make.
# The environment is made anew only when requirements.lock or pyproject.toml has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.capfilt-installed
UV_DIR := build/uv
# A uv on the PATH serves; otherwise one of our own is put under build/, never into .venv.
UV_ON_PATH := $(shell command -v uv 2>/dev/null)
UV := $(or $(UV_ON_PATH),$(UV_DIR)/bin/uv)

CAPFILT_TEST_WORKERS ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)))' 2>/dev/null || echo 2)
PYTEST_ARGS ?=
BENCH_ARGS ?=

export NO_ALBUMENTATIONS_UPDATE := 1
export WANDB_MODE := disabled
# Waiting threads sleep: a machine that does other work too is not slowed down by spinning.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test stress check format bench assets docs install lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## the whole main job on the built-in miniature world, in runs/demo (about five minutes)
	$(BIN)/capfilt demo

test: $(INSTALLED) ## every test, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CAPFILT_TEST_WORKERS) --dist worksteal -q $(PYTEST_ARGS)

stress: $(INSTALLED) ## the reliability matrix at full size, with its figures (tests/stress)
	CAPFILT_STRESS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stress -n $(CAPFILT_TEST_WORKERS) --dist worksteal -q $(PYTEST_ARGS)

check: $(INSTALLED) ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## time captioning, ranking, filtering beside transformers and open_clip (long; BENCH_ARGS=--full: longer)
	# Nothing else runs here: threads may spin, as they do where the variable is not set.
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks $(BENCH_ARGS)

assets: $(INSTALLED) ## rebuild the embedded models from nothing (resumable, up to three hours on two cores)
	$(BIN)/python -m capfilt.assets

docs: $(INSTALLED) ## make docs/cli.md anew, from the commands
	$(BIN)/python -m capfilt.cli.reference

install: $(INSTALLED) ## build .venv and nothing else

lock: | $(UV) ## resolve requirements.lock afresh from pyproject.toml
	$(UV) pip compile --quiet --upgrade pyproject.toml --extra dev --universal --python-version 3.11 \
	  --no-emit-index-url --no-annotate --no-header -o build/requirements.txt
	{ sed -n '/^#/p' requirements.lock; cat build/requirements.txt; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean: ## remove .venv and build/ (runs/ stays)
	rm -rf $(VENV) build dist

$(INSTALLED): requirements.lock pyproject.toml | $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python '>=3.11,<3.13' $(VENV)
	# Compiled once, where Python is told not to keep what it compiles too: torch alone takes two seconds each time.
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock -e .
	$(BIN)/python -m compileall -q capfilt
	@touch $@

$(UV_DIR)/bin/uv:
	@mkdir -p build
	$(PYTHON) -m venv $(UV_DIR) && $(UV_DIR)/bin/python -m pip install --quiet uv \
	  || $(PYTHON) -m pip install --quiet --target $(UV_DIR) uv
