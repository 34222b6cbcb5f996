# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Aim has wheels for these two. A name that is there may still not run (pyenv leaves such), so try.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12,$(shell $(p) -c "print('$(p)')" 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-others test-ray check bench gpu clean-demo

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

# Two parts side by side, for those with Ray clusters leave a core idle at times. What these say is
# shown when both parts have ended.
test: venv
	@said=$$(mktemp); trap 'rm -f $$said' EXIT; \
	$(MAKE) --no-print-directory --keep-going --jobs=2 RAY_SAID=$$said test-others test-ray; \
	code=$$?; cat $$said; \
	test $$code = 0 && echo "all tests: passed" || { echo "all tests: FAILED, see above"; exit $$code; }

# A thread of torch that waits would spin, and keep the other part from its core. Hundreds of
# processes import the same files: what the first one compiles is kept.
test-others test-ray: export OMP_WAIT_POLICY := passive
test-others test-ray: export PYTHONDONTWRITEBYTECODE :=

test-others: venv
	$(BIN)/python -m pytest -m "not ray"

# Without the cache of what failed last, for the other part writes it.
test-ray: venv
	$(BIN)/python -m pytest -m ray -p no:cacheprovider $(if $(RAY_SAID),> $(RAY_SAID) 2>&1)

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
