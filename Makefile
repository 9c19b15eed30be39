# make train [RECIPE=quickstart] [ARGS="key=value ..."] [DRY_RUN=1]   train; a run directory that exists is resumed
# make check                                                          linter, types, import layers, unit tests: a minute
# make test                                                           make check, then all other tests
# make test-learner [PYTHON=python3.12 VENV=.venv-3.12]              the learner's tests, for a second Python and Megatron-Core
# make theory                                                         check the papers' theorems by taking the step
# make atlas                                                          draw every loss from its code
# make study [STUDY=losses]                                           compare methods over seeds; no name: the list
# make test-integrations [INTEGRATIONS="trl verl skyrl"]              our losses inside other trainers, with their packages
# make keys                                                           write docs/keys.md, the reference of all keys
# make doctor                                                         what this machine has, what it lacks, what that costs
#
# Each installs what is pinned in constraints/ into .venv first, once.

# 3.11 comes first because only there vLLM installs on a CPU. Override: make PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PY := $(VENV)/bin/python

INTEGRATIONS ?= trl verl skyrl
RECIPE ?= quickstart
ARGS ?=
STUDY ?=
DRY_RUN ?=

# Packages are installed without byte code and compile on first use: an environment that forbids writing it would make
# every process of every run compile torch and vLLM anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env train check test test-runs test-distributed test-learner test-learner-short theory atlas study keys
.PHONY: doctor test-integrations

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

env:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -I recipes/setup_env.py --venv $(VENV)

train: env
	@$(PY) -m recipes.train recipe=$(RECIPE) $(if $(filter-out 0 false,$(DRY_RUN)),run.dry_run=true) $(ARGS)

theory: env
	@$(PY) -m recipes.theory

atlas: env
	@$(PY) -m recipes.atlas

study: env
	@$(PY) -m recipes.study $(STUDY) $(ARGS)

keys: env
	@$(PY) -m recipes.checks.reference docs/keys.md

doctor: env
	@$(PY) -m recipes.doctor

# Two test processes, whatever the machine: most tests use one thread, and several start processes of their own.
check: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	@echo "mypy, beside the unit tests"; $(PY) -m mypy & types=$$!; \
	  $(PY) -m pytest -n 2 tests/unit; tests=$$?; wait $$types && exit $$tests

# A file's tests stay in one process: its fixtures are models, servers, process groups and Slurm clusters.
# Two streams. test-runs mostly waits: for servers to start, for faults to be noticed, for jobs to be requeued, so it has
# three processes on two cores. tests/distributed (4 to 8 processes that wait for each other) computes beside it, with less
# priority: tests of faults have time limits. GPU tests skip themselves without a GPU.
test: check
	$(MAKE) -j 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) test-runs test-distributed

test-runs: env
	$(PY) -m pytest -n 3 tests/e2e tests/integration tests/gpu

test-distributed: env
	nice -n 5 $(PY) -m pytest tests/distributed

# Python 3.12 has Megatron-Core 0.19.2 (3.11: 0.16.1), and Triton, whose interpreter runs the kernels' tests on a CPU.
# The short form is what CI runs: what the learner computes in every kind of layout, its checkpoints, the head kernels,
# and Transformer Engine's layers.
LEARNER_SHORT := tests/distributed/kernels $(addprefix tests/distributed/learner/test_,transformer_engine.py \
  learner_checkpoint.py checkpoint_pieces.py context_parallel.py routing_replay.py)
test-learner: env
	$(PY) -m pytest -n 2 tests/unit/learner tests/unit/kernels tests/unit/rl tests/unit/planning tests/unit/checks
	$(PY) -m pytest tests/distributed/learner tests/distributed/kernels

test-learner-short: env
	$(PY) -m pytest -n 2 tests/unit/learner tests/unit/kernels $(LEARNER_SHORT)

# Our losses inside other trainers, with their own packages: one environment each, minutes to install.
test-integrations: $(addprefix .venv-,$(INTEGRATIONS))
	@set -e; for peer in $(INTEGRATIONS); do \
	  PYTHONPATH=. HF_HUB_OFFLINE=1 .venv-$$peer/bin/python -m pytest -q -W ignore -c /dev/null --rootdir . -p no:cacheprovider \
	    --noconftest tests/integrations/test_$$peer.py tests/unit/integrations/test_nemo_aligner.py \
	    tests/unit/integrations/test_skyrl_slime.py; done

.venv-skyrl: PEER_PYTHON = python3.12
.venv-%: constraints/integrations-%.txt
	@rm -rf $@ && $(or $(PEER_PYTHON),$(PYTHON)) -m venv $@ || \
	  { echo "$* needs $(PEER_PYTHON). Without it: make test-integrations INTEGRATIONS='trl verl'" >&2; exit 1; }
	@$@/bin/pip install -q "torch==2.13.0+cpu" || $@/bin/pip install -q "torch==2.13.0"
	@if [ -e constraints/integrations-$*-alone.txt ]; then \
	  $@/bin/pip install -q --no-deps -r constraints/integrations-$*-alone.txt; fi
	@$@/bin/pip install -q -r $< && touch $@
