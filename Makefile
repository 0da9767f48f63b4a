# make train   set up if needed, then train the tiny example; ARGS="trainer.epochs=2" adds settings
# make test    set up if needed, then run the tests; ARGS="-k name" selects tests
# make test-py312  the tests of Megatron and vLLM on Python 3.12 with the newest megatron-core, in .venv312
# make long    the tests that take minutes each: what the shipped experiments must reach
# make lint    formatting, lint, types, import layers, sizes of files and functions, reference pages, imports of the tests
# make mutants  breaks the code one line at a time in a copy and shows which test fails (docs/fidelity.md)
# make faults  puts faults into a run, one at a time, and shows which check sees each (docs/fidelity.md)
# make kills   kill -9 at 20 random moments of saves of both kinds (docs/reliability.md)
# make soak    200 short steps; compares memory, files and threads of every process early and late
# make examples  the scripts of the examples that need no GPU, cut short
# make docs    builds docs/ as a site in build/site, with the reference pages generated from the code
# make bench   the tables of docs/benchmarks.md
# make clean   removes caches and build products; keeps .venv, .venv312 and runs/

VERSION := 3.11
PYTHON ?= python$(VERSION)
PYTHON312 ?= python3.12
VENV := .venv
LOCK := requirements-cpu.lock
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := prompts=examples/arithmetic_mtp/data/validation.jsonl batch_sizes=[1,2,4,8,16,32,64] min_rollouts=16 \
	 max_prompt_length=64 max_generate_length=96 out=build/eval_draft.json

# Containers often set it. A run starts many processes, and each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup train test test-py312 examples long lint docs faults mutants kills soak bench clean
.DEFAULT_GOAL := train

setup: $(READY)

$(READY): $(LOCK) pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(PYTHON) $(VERSION) $(VENV) $(LOCK)
	@touch $@

train: setup
	@$(BIN)/skyrl-spec train experiment=cpu_mtp_grpo $(ARGS)

test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-py312:
	@$(MAKE) --no-print-directory test VERSION=3.12 PYTHON=$(PYTHON312) VENV=.venv312 LOCK=requirements-cpu-py312.lock \
	    ARGS="tests/megatron tests/rollout tests/unit/test_imports.py $(ARGS)"

examples: setup
	@$(BIN)/python -m pytest -m examples tests/e2e/test_examples.py $(ARGS)

docs: setup
	@$(BIN)/python scripts/reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open build/site/index.html"

long: setup
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python scripts/sizes.py
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/python scripts/reference.py --check
	@collected=$$($(BIN)/python -W ignore -m pytest --collect-only -qq tests) || { echo "$$collected" | grep -v '^tests/'; exit 1; }

faults: setup
	@PYTHONPATH=tests/fidelity $(BIN)/python tests/fidelity/faults.py

mutants: setup
	@$(BIN)/python tests/mutants/run.py $(ARGS)

kills: setup
	@$(BIN)/python -m pytest -m slow -s tests/megatron/test_killed_saves.py

soak: setup
	@$(BIN)/python tests/soak.py $(ARGS)

bench: setup
	@mkdir -p build
	@$(BIN)/python benchmarks/soft_ce.py
	@$(BIN)/skyrl-spec eval-draft target=examples/arithmetic_mtp/model $(BENCH) num_speculative_tokens=[3]
	@$(BIN)/skyrl-spec eval-draft target=examples/arithmetic_dflash/model draft=examples/arithmetic_dflash/draft $(BENCH) \
	    num_speculative_tokens=[7]

clean:
	@find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist outputs
