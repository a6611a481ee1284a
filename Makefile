# Everything a clone needs is a target here; `make` lists them. PYTHON picks the interpreter that .venv is made with.
PYTHON ?= python3
PYTEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
CORE := $(VENV)/core.stamp
ALL := $(VENV)/all.stamp
BENCHMARKS ?= $(filter-out benchmarks/__init__.py benchmarks/results.py,$(wildcard benchmarks/*.py))

# Two worker processes with one thread each are faster than one process with two threads, and give the same bits.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test setup format lint types docs generate claims bench faults check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(CORE)  ## distil on real data, print a table, write report.html (about three minutes)
	$(BIN)/limbeck demo $(ARGS)

test: $(ALL)  ## run the tests; PYTEST_WORKERS=0 in one process, ARGS for pytest's own options
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(ARGS)

setup: $(ALL)  ## make .venv with every extra and tool

format: $(ALL)  ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(ALL)  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(ALL)  ## check types
	$(BIN)/mypy

generate: $(ALL)  ## write the catalogue, the generated pages and the tables in README.md
	$(BIN)/python docs/generate.py

docs: generate  ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going --nitpicky --quiet -j 2 -b html docs docs/_build/html

claims: $(ALL)  ## re-run the claims (ARGS="kd dkd" for some) and rewrite their figures
	$(BIN)/python -m claims $(ARGS)
	$(BIN)/python docs/generate.py

bench: $(ALL)  ## measure speed and memory against peers, into benchmarks/results.csv
	@for script in $(BENCHMARKS); do \
	  echo "$$script"; $(BIN)/python $$script --csv benchmarks/results.csv || exit 1; \
	done
	$(BIN)/python docs/generate.py

faults: $(ALL)  ## the long fault runs: 200 kills, each followed by a bit-exact resume
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" --timeout 3600 -s $(ARGS)

check: lint types docs test  ## format, style, types, documentation and tests

clean:  ## remove .venv, caches and what the targets built
	rm -rf $(VENV) build dist artifacts docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# The demo needs the package and the models of its language part; everything else needs all extras and tools.
$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing limbeck into $(VENV); torch is large, so the first time takes some minutes"
	$(PIP) -c constraints.txt -e '.[language]'
	@touch $@

$(ALL): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing limbeck with its extras and tools into $(VENV); the first time takes some minutes"
	$(PIP) -c constraints.txt -e '.[all,dev,docs]'
	@touch $(CORE) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "limbeck needs Python 3.11 or newer, and '$(PYTHON)' is not; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON)' cannot make virtual environments; on Debian: apt-get install python3-venv"; \
	  rm -rf $(VENV); exit 1; }
