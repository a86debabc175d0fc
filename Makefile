# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
SELDOM := tests?|testing|transformers/models|diffusers/(modular_)?pipelines|torch/_inductor|pytorch_lightning|lightning_fabric
SELDOM := $(SELDOM)|networkx|fontTools|playwright|setuptools|pygments/lexers|sympy/(physics|combinatorics|stats|parsing)
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export GOMP_SPINCOUNT ?= 1000
export KMP_BLOCKTIME ?= 1

.PHONY: setup demo test check lint docs bench clean
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	# beside the environment, for the tests of FID: its torchvision would not fit a CPU torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt --no-deps --upgrade \
		--target .venv/fidelity torch-fidelity
	# on all cores, where pip would compile file by file; files for another Python are left, and what hardly anyone imports
	$(BIN)/python -m compileall -qq -j 0 -x '/($(SELDOM))/' .venv/lib .venv/fidelity || true
	@touch $@

demo: setup  ## train xs, s and m on the digits, sample them; seconds of all rivals on the family that comes along: runs/demo/
	$(BIN)/python train.py experiment=demo
	$(BIN)/python sample.py experiment=fastest

test: setup  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test  ## what continuous integration runs

docs: .venv/docs-installed  ## the site, strictly: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

bench: setup  ## the figures of benchmarks/README.md, but for those that need the family of `make demo`
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/busy.py
	$(BIN)/python benchmarks/theory.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/orders.py
	$(BIN)/python benchmarks/logconcave.py
	$(BIN)/python benchmarks/midpoints.py
	$(BIN)/python train.py experiment=dead_leaves16
	$(BIN)/python benchmarks/multilevel.py runs/dead_leaves16/family

clean:
	rm -rf .venv runs data site
