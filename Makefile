# Needs Python 3.11 or newer with pip, and make. Everything is installed into .venv, nothing else is touched.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -qq: errors only. To watch pip work: make test PIP_FLAGS=
PIP_FLAGS ?= -qq
PIP_INSTALL = $(BIN)/python -m pip install $(PIP_FLAGS)
PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test check docs notebooks constraints clean help

demo: $(VENV)/.runtime  ## Run the whole path, text to feature browser, on the embedded model (into demo_run/)
	$(BIN)/saekit demo --out demo_run

test: $(VENV)/.dev  ## Run the tests (some only: make test PYTEST_ARGS="-k topk")
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(VENV)/.dev  ## Formatting, lint, and both type checkers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pyright

# The variable keeps the theme from printing what it thinks of a coming version of mkdocs.
docs: $(VENV)/.docs  ## Build the documentation into site/, to be read without a network (site/index.html)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# NOTEBOOKS="--check 03" runs the third one and writes nothing.
NOTEBOOKS ?=
notebooks: $(VENV)/.dev  ## Run the notebooks from top to bottom and keep their outputs
	$(BIN)/python notebooks/run.py $(NOTEBOOKS)

# The five stamps below are what makes a second call quick: each is newer than the files it was made from.

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "saekit: there is no '$(PYTHON)' here; install Python 3.11 or newer, or say: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "saekit: needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1); say: make $(MAKECMDGOALS) PYTHON=/path/to/newer/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "saekit: '$(PYTHON)' lacks the venv module; install it (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "saekit: making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch by itself and first, so that nothing else decides which build of it comes.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "saekit: installing PyTorch (a large download; some minutes the first time)"
	@$(PIP_INSTALL) torch -c constraints.txt
	@touch $@

# The default editable mode only: the strict and compat modes break the package mapping (docs/adr/0001).
$(VENV)/.runtime: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "saekit: installing saekit and what it needs"
	@$(PIP_INSTALL) -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "saekit: installing saekit with the tools for tests and checks"
	@$(PIP_INSTALL) -e '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.runtime

$(VENV)/.docs: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "saekit: installing saekit with what builds its documentation"
	@$(PIP_INSTALL) -e '.[docs]' -c constraints.txt
	@touch $@ $(VENV)/.runtime

# A fresh environment with the newest of everything, less what is of one kind of machine:
# local versions (+cpu) and the CUDA packages, which a GPU build of torch pins by itself.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
constraints:  ## Write constraints.txt anew from the newest versions (TORCH=2.13.0 picks torch's); test, then commit
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	echo "saekit: installing the newest versions into $$scratch (some minutes)"; \
	$(PYTHON) -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/python" -m pip install $(PIP_FLAGS) "torch==$(TORCH)"; \
	"$$scratch/venv/bin/python" -m pip install $(PIP_FLAGS) -e '.[dev,docs]'; \
	{ echo "# Every version that the tests ran with. Made by: make constraints"; \
	  "$$scratch/venv/bin/python" -m pip freeze --exclude-editable \
	    | sed -E -e 's/\+[a-z0-9.]+$$//' -e '/^(nvidia|cuda|triton|setuptools)/Id' -e '/ @ /d'; \
	} > "$$scratch/constraints.txt"; \
	mv "$$scratch/constraints.txt" constraints.txt; \
	echo "saekit: wrote constraints.txt ($$(grep -c == constraints.txt) versions)"

clean:  ## Remove caches, build products, site/ and demo_run/ (.venv stays: delete it by hand to start afresh)
	rm -rf build dist site *.egg-info demo_run notebooks/work .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find saekit activations_cache trainers evals dashboard tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

help:  ## Show this list
	@echo "make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  \1\t\2/p' Makefile | expand -t 16
