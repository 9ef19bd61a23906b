# make run    install into .venv and run the whole pipeline on the embedded model
# make test   install into .venv, then lint, types, documentation, tests, and whether a release would work
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= --quiet --disable-pip-version-check
TESTS ?= tests
XDIST ?= 2

.PHONY: run install test test-latest lint types docs tests release-check clean

run: $(VENV)/installed
	$(VENV)/bin/shortllm run

install: $(VENV)/installed

# one environment for everything, made again when the pins change
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	touch $@

test: lint types docs tests release-check

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/mypy

# the site, in site/; a warning is an error
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

tests: $(VENV)/installed
	$(VENV)/bin/pytest --numprocesses $(XDIST) $(TESTS)

# sdist and wheel in dist/, and the wheel without extras in an environment of its own
release-check: $(VENV)/installed
	$(VENV)/bin/python tests/check_release.py

# the same tests against the newest transformers, in an environment of their own
test-latest: .venv-latest/installed
	.venv-latest/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	.venv-latest/bin/pytest --numprocesses $(XDIST) $(TESTS)

.venv-latest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt torch
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) --upgrade transformers
	touch $@

clean:
	rm -rf .venv .venv-latest .pytest_cache .mypy_cache .ruff_cache build dist site
