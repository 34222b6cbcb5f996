# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo demo-long test check bench clean-demo

venv: $(STAMP)

# torch is asked for first and alone: a local CPU build, where there is one, satisfies the range.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/python -m elastic demo

demo-long: venv
	$(BIN)/python -m elastic demo --long

test: venv
	$(BIN)/python -m pytest

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: venv
	@set -e; for bench in tests/bench/*.py; do $(BIN)/python $$bench; done

clean-demo:
	rm -rf runs/demo runs/demo-videos
