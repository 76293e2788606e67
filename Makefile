# make quickstart   a whole SeRA run from nothing, beside plain DPO: environment, install, toy world, SFT, T = 3, win rates
# make test         the test suite
# make lint         ruff

PYTHON ?= .venv/bin/python
BASE_PYTHON ?= python3

.PHONY: quickstart test lint clean

quickstart: $(PYTHON)
	$(PYTHON) -m pip install --quiet -e .
	PYTHON=$(PYTHON) bash launch/quickstart.sh

test: $(PYTHON)
	$(PYTHON) -m pip install --quiet -e '.[dev]'
	$(PYTHON) -m pytest -q

lint: $(PYTHON)
	$(PYTHON) -m ruff check sera_jax tests
	$(PYTHON) -m ruff format --check sera_jax tests

.venv/bin/python:
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip

clean:
	rm -rf .venv runs build
