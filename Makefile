# Needs Python 3.11 or newer and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv venv-dev test lint test-lm-eval kills quickstart clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# The stamps are written after a whole install, so that one cut short is done again.
venv: $(VENV)/installed  ## install what training and generation need into .venv
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	@touch $@

venv-dev: $(VENV)/installed-dev  ## the same, with what the tests need
$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	@touch $@

test: lint  ## check style, then run all tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: venv-dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-lm-eval: venv-dev  ## test lm_eval_harness.py with lm-evaluation-harness, which is installed (620 MB)
	$(INSTALL) lm_eval==0.4.13
	$(BIN)/python -m pytest tests/test_lm_eval.py

kills: venv-dev  ## kill a small run fifty times, resume it, and compare it with an undisturbed one
	PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/kills.py --kills 50

quickstart: venv  ## train, extract and generate with the demo model
	PATH="$$(cd $(BIN) && pwd):$$PATH" bash exps/quickstart.sh

clean:  ## remove .venv and the caches (runs, outputs and models stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
