# Two commands do all set-up: `make demo` and `make test`. They need Python 3.11+ with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lock-sha256

.PHONY: demo test check unit format lint types arrows acceptance bench lock venv docs clean

demo: venv
	$(BIN)/edgesync demo --tour

# Redone only when the lock changes: the stamp holds the lock's hash, not a time.
venv:
	@want=$$($(PYTHON) -c "import hashlib,sys;print(hashlib.sha256(open('requirements.lock','rb').read()+open('pyproject.toml','rb').read()+sys.version.encode()).hexdigest())"); \
	if [ "$$(cat $(STAMP) 2>/dev/null)" != "$$want" ]; then \
	  set -e; echo "making $(VENV) (once; takes about half a minute)" >&2; \
	  rm -rf $(VENV); $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .; \
	  printf '%s' "$$want" > $(STAMP); \
	fi

test: check
	$(BIN)/python -m pytest tests --ignore=tests/unit --ignore=tests/property --ignore=tests/vectors

check: venv format lint types arrows unit

format:
	$(BIN)/ruff format --check --quiet .

lint:
	$(BIN)/ruff check --quiet .

types:
	$(BIN)/mypy

arrows:
	$(BIN)/lint-imports --no-cache

unit:
	$(BIN)/python -m pytest -q tests/unit tests/property tests/vectors

acceptance: venv
	$(BIN)/python -m tests.acceptance

bench: venv
	$(BIN)/python -m benchmarks

docs: venv
	$(BIN)/python -m edgesync.testing.state_docs docs/state-machines.md

# Needs uv. The written lock names no index.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --extra dev --no-emit-index-url --no-emit-package edgesync-fleet pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
