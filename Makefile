# Two commands do all set-up: `make demo` and `make test`. They need Python 3.11+ with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check unit format lint types arrows acceptance bench bench-transport bench-network bench-fairness bench-sites bench-outages lock venv docs clean

demo: venv
	$(BIN)/edgesync demo --tour

# Redone only when the lock or the interpreter changes: the stamp holds their hash, not a time. A changed pyproject.toml
# only installs the project itself again, which makes its commands.
venv:
	@set -e; \
	lock=$$($(PYTHON) -c "import hashlib,sys;print(hashlib.sha256(open('requirements.lock','rb').read()+sys.version.encode()).hexdigest())"); \
	project=$$($(PYTHON) -c "import hashlib;print(hashlib.sha256(open('pyproject.toml','rb').read()).hexdigest())"); \
	if [ "$$(cat $(VENV)/.lock-sha256 2>/dev/null)" != "$$lock" ]; then \
	  echo "making $(VENV) (once; takes about half a minute)" >&2; \
	  rm -rf $(VENV); $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	  printf '%s' "$$lock" > $(VENV)/.lock-sha256; \
	fi; \
	if [ "$$(cat $(VENV)/.project-sha256 2>/dev/null)" != "$$project" ]; then \
	  $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .; \
	  printf '%s' "$$project" > $(VENV)/.project-sha256; \
	fi; \
	$(BIN)/python -m compileall -q edgesync gateway device

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

bench-transport: venv
	$(BIN)/python -m benchmarks.transport

# These four need root, and hours: each takes OPTIONS, such as OPTIONS=--quick.
bench-network: venv
	$(BIN)/python -m benchmarks.network $(OPTIONS)

bench-fairness: venv
	$(BIN)/python -m benchmarks.fairness $(OPTIONS)

bench-sites: venv
	$(BIN)/python -m benchmarks.sites $(OPTIONS)

bench-outages: venv
	$(BIN)/python -m benchmarks.outages $(OPTIONS)

docs: venv
	$(BIN)/python -m edgesync.testing.state_docs docs/state-machines.md

# Needs uv. The written lock names no index.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --extra dev --no-emit-index-url --no-emit-package edgesync-fleet pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
