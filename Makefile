# make train   set up if needed, then the run every other one starts from; ARGS="trainer.epochs=2" adds overrides
# make test    set up if needed, then the tests; ARGS="-k name" chooses among them
# make lint    formatting, lint and types
# make bench   the two benchmarks of docs/benchmarks.md
# make clean   caches and build products; neither .venv nor runs/

PYTHON ?= python3.11
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train test lint bench clean
.DEFAULT_GOAL := train

setup: $(READY)

$(READY): requirements-cpu.lock pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) scripts/setup.sh
	@touch $@

train: setup
	@$(BIN)/skyrl-spec train experiment=cpu_mtp_grpo $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/soft_ce.py
	@$(BIN)/python benchmarks/rollout.py

clean:
	@find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist outputs
