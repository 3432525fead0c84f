# Every target sets up what it needs: `make quickstart` and `make test` work in a fresh clone.

SHELL := /bin/bash
.DEFAULT_GOAL := help
# The checks share one machine and their output is read top to bottom.
.NOTPARALLEL:
.PHONY: help venv quickstart test test-slow test-slurm test-gpu check lint format types \
	shellcheck mutants bench clean

BIN := .venv/bin
SHELL_SCRIPTS = $(wildcard .ci/run tools/*.sh launch/*.sh launch/*.sbatch launch/*/*.sh \
	launch/*/*.sbatch launch/env.example examples/*/*.sh \
	tests/slurm/*.sh)

# Interpreter to make .venv from; empty: look for one. Used by tools/find_python.sh.
PYTHON ?=
export PYTHON

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | \
	  awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

venv:  ## make or update .venv from requirements.lock (PYTHON=path to choose the interpreter)
	@tools/set_up_venv.sh

quickstart: venv  ## train a small model on the CPU (TEXT=file, OUT=folder for results, ARGS="..." for the command)
	@$(BIN)/megatron-mup quickstart $(if $(TEXT),--text "$(TEXT)") $(if $(OUT),--out "$(OUT)") $(ARGS)

test: venv  ## unit and multi-process tests (ARGS="..." for pytest, WORKERS=n processes)
	@tools/run_tests.sh $(ARGS)

test-slow: venv  ## tests that take minutes; some need Slurm
	@tools/find_slurm.sh
	@tools/run_tests.sh -m slow $(ARGS)

test-slurm: venv  ## tests that start a Slurm of their own on this machine
	@tools/find_slurm.sh
	@tools/run_tests.sh -m slurm $(ARGS)

test-gpu: venv  ## tests that need a CUDA device
	@tools/run_tests.sh -m gpu $(ARGS)

check: lint types shellcheck test  ## all that a change has to pass; what CI runs

lint: venv  ## ruff: format and rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

format: venv  ## rewrite the sources to ruff's format, mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

types: venv  ## mypy --strict
	@$(BIN)/mypy

shellcheck: venv  ## check all shell scripts
	@$(BIN)/shellcheck --external-sources $(SHELL_SCRIPTS)

mutants: venv  ## break the package in every listed way; each must fail its tests (ARGS="--only WORDS")
	@$(BIN)/python -m tests.mutants.run $(ARGS)

bench: venv  ## measure training speed on this machine
	@$(BIN)/python -m megatron_mup.benchmark

clean:  ## remove .venv, caches and build outputs
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
