# What a newcomer types. `make` alone lists the targets.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint doctor clean distclean

PYTHON := .venv/bin/python
WORKERS ?= 2

# Two computing threads that wait by spinning are slower than one; nothing is uploaded unless asked for.
export OMP_WAIT_POLICY ?= PASSIVE
export WANDB_MODE ?= offline

# A shared copy of the assets and of the reference recordings, where the checkout has one beside it.
ifneq ($(wildcard ../shared/simpler_assets/data),)
export SIMPLER_ASSET_DIR ?= $(abspath ../shared/simpler_assets)
endif
ifneq ($(wildcard ../shared/simpler_golden),)
export SIMPLER_GOLDEN_DIR ?= $(abspath ../shared/simpler_golden)
endif

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup:  ## virtual environment, pinned packages, Vulkan driver and assets; does nothing when all is there
	@scripts/setup.sh

demo: setup  ## the whole pipeline, small: demonstrations, two pretrainings, two policies, report (20 minutes)
	@$(PYTHON) experiments/demo.py

test: setup  ## all tests (about 10 minutes on two cores)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) -rs --durations=10

lint: setup  ## style and formatting
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

doctor: setup  ## check this machine: Python, torch, Vulkan, assets, disk, one frame, one action
	@$(PYTHON) experiments/doctor.py

clean:  ## remove caches and build products; data/ and runs/ stay
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info

distclean: clean  ## clean, and remove the virtual environment
	@rm -rf .venv
