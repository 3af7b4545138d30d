# PYTHON makes the environment VENV if it is not there. VENV may be an environment of your own:
#   make test VENV=~/envs/detectron2
PYTHON ?= python3
VENV ?= .venv

# Further arguments of the demo, or of pytest: make test ARGS="tests/modeling -x"
ARGS ?=
DEMO = train_net.py --config-file configs/Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml

VENV_PYTHON = $(VENV)/bin/python
# Says that VENV is complete, so that demo, test and docs need not look; setup always does.
READY = $(VENV)/.rev_det-ready
define install
	$(VENV_PYTHON) tools/setup_env.py
	@touch $(READY)
endef
# Of `make gpu`, which installs nothing: the PYTHON that is given, otherwise that of VENV if it is there.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(VENV_PYTHON)),$(PYTHON)),$(PYTHON))
CHECK = import sys; v = sys.version_info; sys.exit('error: rev_det needs Python 3.10 or newer, $(PYTHON) is \
	%d.%d; name another: make PYTHON=python3.11' % v[:2] if v < (3, 10) else 0)

# lint and test make the same environment
.NOTPARALLEL:
.PHONY: help setup demo test test-slow gpu lint format lint-setup docs clean

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: | $(VENV_PYTHON) ## make the environment VENV, or add what an existing one lacks
	$(install)

$(READY): setup.py tools/setup_env.py tools/detectron2.txt | $(VENV_PYTHON)
	$(install)

$(VENV_PYTHON):
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON); name your Python 3.10 or newer:" \
	  "make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c "$(CHECK)"
	@test ! -e $(VENV) || rmdir $(VENV) 2>/dev/null || { echo "error: $(VENV) is there but has no working" \
	  "bin/python: remove it, or name an environment with VENV=" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

demo: $(READY) ## train the nano Rev-MViT Mask R-CNN on generated shapes: minutes on a laptop CPU
	$(VENV_PYTHON) $(DEMO) $(ARGS)

test: $(READY) ## run the tests that take seconds
	$(VENV_PYTHON) -m pytest -m "not slow" $(ARGS)

test-slow: $(READY) ## run the tests that take minutes
	$(VENV_PYTHON) -m pytest -m slow $(ARGS)

gpu: ## measure on a GPU what docs/gpu.md lists: PARTS="doctor tests" GPU_DATA=folder FORCE=1 MINUTES=5
	@$(GPU_PYTHON) benchmarks/gpu.py $(if $(PARTS),--parts $(PARTS)) $(if $(GPU_DATA),--data "$(GPU_DATA)") \
	  $(if $(FORCE),--force) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

lint: lint-setup ## check the code's form, without the gigabytes of torch
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

format: lint-setup ## bring the code into that form
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .

lint-setup: | $(VENV_PYTHON)
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check "$(shell grep -o 'ruff[^"]*' setup.py)"

docs: $(READY) ## build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --clean

clean: ## remove caches and build products; the environment and output/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find rev_det tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
