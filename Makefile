# make train   set up if needed, then the run every other one starts from; ARGS="trainer.epochs=2" adds overrides
# make test    set up if needed, then the tests; ARGS="-k name" chooses among them
# make long    the tests that take minutes each: what the shipped experiments are to reach
# make lint    formatting, lint and types
# make faults  puts faults into a run, one at a time, and prints which check saw each (docs/fidelity.md)
# make kills   kill -9 at 20 random moments of a save (docs/reliability.md)
# make soak    200 short steps, and what the processes hold at the start and at the end
# make bench   the two benchmarks of docs/benchmarks.md
# make clean   caches and build products; neither .venv nor runs/

PYTHON ?= python3.11
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train test long lint faults kills soak bench clean
.DEFAULT_GOAL := train

setup: $(READY)

$(READY): requirements-cpu.lock pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) scripts/setup.sh
	@touch $@

train: setup
	@$(BIN)/skyrl-spec train experiment=cpu_mtp_grpo $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

long: setup
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

faults: setup
	@PYTHONPATH=tests/fidelity $(BIN)/python tests/fidelity/faults.py

kills: setup
	@$(BIN)/python -m pytest -m slow -s tests/megatron/test_killed_saves.py

soak: setup
	@$(BIN)/python tests/soak.py $(ARGS)

bench: setup
	@$(BIN)/python benchmarks/soft_ce.py
	@$(BIN)/python benchmarks/rollout.py

clean:
	@find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist outputs
