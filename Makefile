# Everything happens in a virtual environment of its own: make demo, make test, make lint …
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
CODE := gsrq_jax models kernels tests docs $(wildcard *.py tools benchmarks)
PROMPT ?= What does this text allow me to do, and under which conditions?

# Some machines ask for no .pyc files; every process would then compile JAX's sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test coverage format lint typecheck clean

## demo: learn codebooks for the demo model, then generate with them beside full precision
demo: $(VENV)/.installed
	$(BIN)/python train_codebooks.py
	$(BIN)/gsrq-generate --codebooks runs/demo/codebooks --context LICENSE --compare \
		--max-new-tokens 64 "$(PROMPT)"

## test: the whole suite
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 $(TESTED)

## coverage: the same, in which at least 90 % of the lines of gsrq_jax and models must run; before
## Python 3.12 counting them takes a third of the time
coverage: TESTED := --cov --cov-report=term:skip-covered --cov-fail-under=90
coverage: test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

## typecheck: of the installed wheel, where models and kernels are inside gsrq_jax
typecheck: $(VENV)/.installed-dev
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >/dev/null
	$(PIP) --no-deps --target build/site build/wheel/*.whl
	cd build && MYPYPATH=site $(BIN)/mypy --config-file ../pyproject.toml \
		--cache-dir ../.mypy_cache -p gsrq_jax

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Stamps: installed again only when pyproject.toml changes.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"error: gsrq-jax needs Python 3.11 or newer; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.installed
