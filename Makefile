# 3.11 is what constraints.txt was made with and what the whole suite runs on; 3.12 (its quick tests in CI) and 3.13
# (some of them, by hand) where none runs
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13; do $$name -c '' 2>/dev/null && echo $$name && exit; done; echo python3)
# Where the packages go: VENV=build/py3.12 PYTHON=python3.12 makes a second environment beside the first.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env train test test-level fuzz check benchmarks gpu docs clean

env: $(STAMP)

# torch is installed first and by its exact version: a range would pull gigabytes of CUDA libraries. Hugging Face's
# `kernels` is for one test, which puts its folder on the path: where it can be imported, bitsandbytes asks the hub
# for a kernel whenever it is imported.
$(STAMP): pyproject.toml kernels/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch triton setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e kernels/ -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/hub kernels tomlkit
	touch $(STAMP)

train: env
	$(BIN)/crd-fast train $(ARGS)

# In two processes of one thread each; ARGS='-n 0 -x' runs it in one and stops at the first failure. Bytecode is kept
# whatever the environment says: many tests start processes, and each would compile the package anew.
test: env
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# As other x86 processors round, also as Intel's on AMD's: LEVEL=avx512, avx2 or sse4.
LEVEL ?= avx2
test-level: env
	$(BIN)/python -m tools.test_as $(LEVEL) $(ARGS)

# What the suite tries a fixed number of, TIMES as often and other ones each time.
TIMES ?= 20
fuzz: env
	CRD_FAST_FUZZ=$(TIMES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz $(ARGS)

benchmarks: env
	$(BIN)/python -m pytest benchmarks $(ARGS)

# On a machine with a GPU: its tests, the benchmarks and a training run, one result page.
gpu: env
	$(BIN)/python -m tools.gpu_check $(ARGS)

# The site, under build/site; a link that leads nowhere is an error.
docs: env
	$(BIN)/mkdocs build $(ARGS)

# What CI asks of every file before it runs a test; mypy's settings are in pyproject.toml.
check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache $(foreach root,. kernels,$(root)/build $(root)/dist $(root)/*.egg-info)
