# make run       install what a run needs into .venv, and run the whole pipeline on the embedded model
# make test      install the rest, then lint, types, documentation and the tests that are not slow
# make test-all  the same with the slow tests, and whether a release would work
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= --quiet --disable-pip-version-check --no-compile
TESTS ?= tests
XDIST ?= 2

PIP = $(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt
PYTEST = $(VENV)/bin/pytest --numprocesses $(XDIST)

.PHONY: run install test test-all test-latest lint words layers types docs tests slow-tests \
	all-tests release-check golden clean

run: $(VENV)/run-installed
	$(VENV)/bin/shortllm run

install: $(VENV)/installed

# one environment in two steps: what a run needs, then what development needs on top of it
$(VENV)/run-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[eval,gguf,train]'
	touch $@

$(VENV)/installed: $(VENV)/run-installed
	$(PIP) --editable '.[dev]'
	touch $@

test: lint types docs tests

test-all: lint types docs all-tests release-check

lint: words layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# words that are not to come back: tools/retired_words.txt
words: $(VENV)/installed
	$(VENV)/bin/python tools/check_words.py

# imports go down only, see `How the parts fit` in CONTRIBUTING, and modules have no cycles
layers: $(VENV)/installed
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python tools/measure_code.py --check

types: $(VENV)/installed
	$(VENV)/bin/mypy

# the site, in site/; a warning is an error (not with --quiet, which hides them from --strict)
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

tests: $(VENV)/installed
	$(PYTEST) -m "not slow" $(TESTS)

slow-tests: $(VENV)/installed
	$(PYTEST) -m slow $(TESTS)

all-tests: $(VENV)/installed
	$(PYTEST) $(TESTS)

# sdist and wheel in dist/, and the wheel without extras in an environment of its own
release-check: $(VENV)/installed
	$(VENV)/bin/python tests/check_release.py

# write the goldens again, after a change made on purpose: make golden KINDS=help
golden: $(VENV)/installed
	$(VENV)/bin/python tests/golden.py --write $(KINDS)

# all tests against the newest transformers, in an environment of their own
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
