# `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Two processes share the machine in tests; more threads than cores only fight.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo up test check bench docs messages migration lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/.installed static/vendor/manifest.json ## Install everything into .venv and static/vendor

# torch first and pinned: an unpinned one would fetch gigabytes of CUDA on a machine without a GPU. DeepSpeed comes as
# source: it wants to see torch, and compiles none of its kernels before one is used.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pegbox needs Python 3.11 or newer; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation $$(grep '^deepspeed==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[web,worker,dev]'
	@touch $@

static/vendor/manifest.json: package.json package-lock.json app/vendor.py .venv/.installed
	$(BIN)/python -m app.vendor

demo: setup ## Train the built-in model on the built-in data, and stay up (ARGS=--exit ends after it)
	$(BIN)/pegbox demo $(ARGS)

up: setup ## Start everything on this machine (ARGS="--port 8000 --data-dir ./data")
	$(BIN)/pegbox up $(ARGS)

# A file of tests stays in one process, two at a time: much of the time is spent waiting for real processes.
test: setup ## Run every test (ARGS="tests/core -k packing")
	@$(BIN)/python -m tests.chromium
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

check: setup ## Formatting, lints, types, the contracts between rooms
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Short forms; docs/benchmarks.md names the long ones and those for a GPU.
BENCHES := "packing --short" "throughput --short --without-mixes" "preprocess --conversations 500 --pairs 1" \
	"attention --lengths 512 2048 --rounds 1" "memory --layers 2" "communication --short" "preflight --short"

bench: setup ## Run every benchmark that needs no GPU, in its short form
	@for bench in $(BENCHES); do echo "== bench.$$bench"; $(BIN)/python -m bench.$$bench || exit 1; echo; done

docs: setup ## Write docs/spec.md from core/spec.py
	$(BIN)/python -m launch.reference

messages: setup ## Extract all texts for translators into locale/pegbox.pot
	@mkdir -p locale
	$(BIN)/pybabel -q extract -F babel.cfg -k N_ -k _ -k ngettext:1,2 -k knob:2 --no-location --omit-header -o locale/pegbox.pot .

migration: setup ## Write a migration from the difference between tables and schema (ARGS="what changes")
	$(BIN)/alembic -c migrations/alembic.ini revision --autogenerate -m "$(ARGS)"

lock: setup ## Write the exact versions that are installed now to constraints.txt
	@{ head -n 1 constraints.txt; $(BIN)/pip freeze --exclude-editable --exclude pegbox | sed 's/+cpu$$//'; } > .venv/constraints.new
	@mv .venv/constraints.new constraints.txt && touch .venv/.installed

clean: ## Remove what setup made; your data stays
	rm -rf .venv node_modules static/vendor *.egg-info .pytest_cache .mypy_cache .ruff_cache
