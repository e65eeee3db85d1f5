# Two commands: `make demo` trains and compares, `make test` proves. Both make .venv on first use.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-gpu lint types clean

demo: .venv/.base
	$(BIN)/fathom quickstart

test: .venv/.dev
	$(BIN)/python -m pytest -q

test-gpu: .venv/.dev
	$(BIN)/python -m pytest -q tests/kernels tests/gpu

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.dev
	$(BIN)/mypy

# constraints.txt names torch first: where there is no GPU that version installs as a CPU build.
.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fathom needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
