# Two commands do everything: `make demo` opens the example, `make test` runs the tests.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-port test minimum django6 torture bench run-bench docs style clean

PYTHON ?= python3
VENV ?= .venv
PORT ?= 5000
EXTRAS ?= test
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
TYPES_STAMP := $(VENV)/.installed-types
DEMO_STAMP := $(VENV)/.installed-demo
DOCS_STAMP := $(VENV)/.installed-docs
BENCH_VENV ?= .venv-bench
MINIMUM_VENV ?= .venv-minimum
# Each driver, each extra and the commands; `tox -e min` runs every test.
MINIMUM := tests/subscriptions tests/test_metadata.py tests/unit/test_config.py tests/unit/test_lifecycle.py \
	tests/unit/test_errors.py tests/unit/test_models.py tests/unit/test_orjson_transcoder.py tests/integration/test_cli.py
DJANGO6_VENV ?= .venv-django6
# What a new Django may break; the ways over from other packages and the killed workers do not depend on it.
DJANGO6 := tests/django_host --ignore=tests/django_host/test_ways_over.py --ignore=tests/django_host/test_killed_workers.py \
	-m "not torture and not long"
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:
	@echo 'make demo     open the example bank at http://127.0.0.1:$(PORT)/ (PORT=... for another port)'
	@echo 'make test     run the tests, in some minutes (LONG=1 for every one; ARGS=... goes to pytest)'
	@echo 'make minimum  run some of them on the oldest versions that are admitted'
	@echo 'make django6  run the tests of the Django host with Django 6, on a Python 3.12 or later'
	@echo 'make torture  run the long tests under load'
	@echo 'make bench    measure, beside other packages (ARGS=--quick to see that it works)'
	@echo 'make docs     build the documentation into docs/_build/html'
	@echo 'make style    lint, check the format and the types'
	@echo 'make clean    remove what these commands made'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or later is needed; name it: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(TYPES_STAMP): pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[types]'
	@touch $@

$(DEMO_STAMP): pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(DOCS_STAMP): pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[docs,migrate]'
	@touch $@

demo: demo-port $(DEMO_STAMP)
ifeq ($(DEMO_CHECK),1)
	$(BIN)/python -m example_app.demo_check
else
	@$(BIN)/python -m example_app.demo $(PORT)
endif

# Before anything is installed, which takes a minute.
demo-port:
ifneq ($(DEMO_CHECK),1)
	@$(PYTHON) example_app/demo.py $(PORT) --check-port
endif

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# The oldest versions that the metadata admits have an environment of their own.
minimum:
	PIP_CONSTRAINT=tests/minimum.txt $(MAKE) --no-print-directory VENV=$(MINIMUM_VENV) EXTRAS=test ARGS='$(MINIMUM)' test

django6:
	@newer="$$($(PYTHON) tests/newer_python.py)"; if [ -n "$$newer" ]; then \
		PIP_CONSTRAINT=tests/django6.txt $(MAKE) --no-print-directory VENV=$(DJANGO6_VENV) PYTHON="$$newer" \
			EXTRAS=test-django ARGS='$(DJANGO6)' test; \
	else \
		echo 'Skipped: Django 6 needs Python 3.12 or later, and there is none on PATH or among those of pyenv.' >&2; \
		[ "$$REQUIRE_SERVERS" != 1 ]; \
	fi

torture: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m torture --timeout 3600 $(ARGS)

# eventsourcing-sqlalchemy admits only older versions of SQLAlchemy, and all that is measured has to share one.
bench:
	@$(MAKE) --no-print-directory VENV=$(BENCH_VENV) EXTRAS=bench run-bench

run-bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)
# What ARGS asks for may be a part of the first only.
ifeq ($(filter-out --quick,$(ARGS)),)
	$(BIN)/python -m benchmarks.projections $(ARGS)
	$(BIN)/python -m benchmarks.large_saves $(ARGS)
	$(BIN)/python -m benchmarks.metadata $(ARGS)
	$(BIN)/python -m benchmarks.sessions $(ARGS)
	$(BIN)/python -m benchmarks.django_rows $(ARGS)
	$(BIN)/python -m benchmarks.cassandra $(ARGS)
endif

docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

# Pyright asks the network whether there is a newer version, unless it is told not to.
style: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
style: $(STAMP) $(TYPES_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.typing.verify

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(MINIMUM_VENV) $(DJANGO6_VENV) .tox .mypy_cache .pytest_cache .ruff_cache build dist docs/_build benchmarks/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
