# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Aim has wheels for these two. A name that is there may still not run (pyenv leaves such), so try.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12,$(shell $(p) -c "print('$(p)')" 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test check bench gpu clean-demo

venv: $(STAMP)

# torch is asked for first and alone: a local CPU build, where there is one, satisfies the range.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Restage needs Python 3.11 or 3.12: install one, or name it: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/python -m elastic demo

test: venv
	$(BIN)/python -m pytest

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

BENCHES := $(wildcard tests/bench/*.py)
bench: venv
	@set -e; for bench in $(BENCHES); do $(BIN)/python $$bench; done

# On a machine with a GPU: what only that can show. SECONDS bounds all of it.
gpu: venv
	$(BIN)/python tests/on_gpu.py $(if $(SECONDS),--seconds $(SECONDS))

clean-demo:
	rm -rf runs/demo runs/demo-videos
