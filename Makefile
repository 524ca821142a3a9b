# `make demo` and `make test` set up their own environment in .venv, from a plain Python and nothing else.
PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow lint types docs clean

demo: .venv/demo
	$(BIN)/kfac-cond demo $(if $(STEPS),--steps $(STEPS)) $(DEMO_ARGS)

# One thread a worker: of two that share cores each would wait for the other's.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TEST_ARGS)

slow: .venv/test
	$(BIN)/python -m pytest -m slow $(TEST_ARGS) || test $$? -eq 5  # 5: no test carries the marker

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/lint
	$(BIN)/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site demo-results

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp an extra, in a chain for `make -j`: two installs into one environment must not run at once.
.venv/demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo]'
	touch $@

.venv/test: pyproject.toml constraints.txt tests/peers.txt tests/architectures.txt tests/integrations.txt | .venv/demo
	$(PIP) -e '.[test]'
	$(PIP) --no-deps -r tests/peers.txt -r tests/architectures.txt -r tests/integrations.txt
	touch $@

.venv/lint: pyproject.toml constraints.txt | .venv/test
	$(PIP) -e '.[test,lint]'
	touch $@

.venv/docs: pyproject.toml constraints.txt | .venv/lint
	$(PIP) -e '.[docs]'
	touch $@
