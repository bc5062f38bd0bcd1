# Every target sets up its own virtual environment and finds it ready the next time.
#
#   make demo    the product from end to end, on this machine
#   make test    lint, then every test
#   make crash   a thousand power cuts on a simulated disk, sixty processes killed while they train
#   make lint    ruff and mypy
#   make bench   the committed benchmark records, anew (an hour and a half)
#   make bench-gpu   those that need a GPU, in two calls of at most ten minutes: BENCH_ARGS='--part 1', then 2
#   make proto   the protobuf stub, after a change in proto/
#   make clean   remove everything that these targets made
#
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS=... is handed to pip, PYTEST_ARGS=... to pytest,
# BENCH_ARGS=... to `tierbench gpu`.
# WORKERS=0 runs the tests in one process.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test crash lint bench bench-gpu proto clean venv

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKED := engram_client tierstore bench tests
STUB := engram_client/wire

help:
	@sed -n 's/^#   //p' Makefile

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tierstore needs Python 3.11 or newer; name one with: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) (once; about a minute where pip finds a CPU build of torch)" >&2
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-input $(PIP_ARGS) \
	  -c constraints.txt -e '.[torch,bench,test]'
	@touch $@

demo: $(READY)
	@$(BIN)/tierbench demo

lint: $(READY)
	@$(BIN)/ruff check -q $(CHECKED)
	@$(BIN)/ruff format -q --check $(CHECKED) || \
	  { echo "run: $(BIN)/ruff format $(CHECKED)" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@echo "lint: clean" >&2

test: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

crash: $(READY)
	@$(BIN)/python -m tierstore.testing.crashes --crashes 1000 --kills 60

bench: $(READY)
	@$(BIN)/tierbench record --out bench/results

bench-gpu: $(READY)
	@$(BIN)/tierbench gpu --device cuda --record bench/results $(BENCH_ARGS)

proto: $(READY)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	  $(BIN)/python -m grpc_tools.protoc -Iproto --python_out="$$out" --pyi_out="$$out" \
	    proto/tierstore/v1/memory.proto && \
	  cp "$$out"/tierstore/v1/memory_pb2.py "$$out"/tierstore/v1/memory_pb2.pyi $(STUB)/

clean:
	@rm -rf $(VENV) .demo .bench build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find engram_client tierstore bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
