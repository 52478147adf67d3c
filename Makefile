# Every target builds .venv first, or refreshes it when the dependencies have changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
# Written only after pip has succeeded, so that an interrupted set-up is done again.
STAMP := $(VENV)/.installed
# A process for each core, of some 2 GB each; a file's tests share what they set up.
TEST := $(RUN) pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: setup demo test test-fast check lab notebooks bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN) pip install -q -c constraints.txt -e '.[lab,test,dev]'
	@touch $@

demo: setup
	@$(RUN) llama_probe.cli demo

test: setup
	@$(TEST)

test-fast: setup
	@$(TEST) -m 'not slow'

check: setup
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) pyright

lab: setup
	@$(RUN) jupyterlab --LabApp.default_url=/lab/tree/notebooks

# After an edit of a notebook or its .py: takes the newer one for both, and strips the outputs.
notebooks: setup
	@$(RUN) jupytext --quiet --sync notebooks/*.py
	@$(RUN) nbconvert --log-level WARN --clear-output --inplace notebooks/*.ipynb

bench: setup
	@$(RUN) benchmarks
