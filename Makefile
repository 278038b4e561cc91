# tc-ray: `make demo` runs the whole job on a fresh machine, `make test` installs what is missing and runs the tests.
# PYTHON=python3.12 chooses the interpreter of .venv; TC_RAY_PIP_FLAGS is handed to every pip call.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo "$$p" && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check $(TC_RAY_PIP_FLAGS)
RECIPE ?= demo
RUN ?= outputs/demo

.PHONY: help install demo test test-slow test-gpu lint docs format serve-demo clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

install: $(VENV)/.installed  ## venv and all packages (again only when pyproject.toml or constraints.txt changed)

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10, 3.11 or 3.12 with venv found; set PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing (DeepSpeed is built from source): 2 to 5 minutes"
	$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## the main job on generated data: train, choose lambda, evaluate, export
	$(BIN)/tc-ray train $(RECIPE)
	@echo 'tc-ray is $(BIN)/tc-ray; "source $(BIN)/activate" puts it on the path of this shell'

# Two processes, which keep two cores busy; files of tests in this order, so that the long ones begin first.
TESTS := $(BIN)/python -m pytest tests/cluster tests/faults tests/unit -n 2 --dist loadfile --no-loadscope-reorder

test: install  ## unit, cluster and fault tests that take seconds
	$(TESTS)

test-slow: test  ## those that take minutes too, in turn: some measure time
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: install  ## what needs a CUDA device (copies of records, the recorder, losses, the serving engine)
	$(BIN)/python -m pytest -m gpu

lint: install docs  ## ruff, mypy and the docs site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## the docs as a site in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: install  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve-demo: install  ## answer over HTTP with the model that `make demo` made
	$(BIN)/tc-ray serve $(RUN)

clean:  ## remove the venv and caches; outputs/ stays
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
