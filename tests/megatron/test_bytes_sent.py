"""Bytes that ranks send in a training step, counted in its collectives: docs/gpus.md, "What is sent"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawn import run_distributed
from tiny_checkpoints import batch_of_lengths, make_config, write_model

from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

FLOAT, NUM_TOKENS = 4, 48
# Index of the argument that has the whole tensor, and the share of its bytes that a rank of R sends, times R / (R - 1).
OPERATIONS = {"all_reduce": (0, 2), "all_gather_into_tensor": (0, 1), "reduce_scatter_tensor": (1, 1)}


@contextmanager
def counted() -> Iterator[Counter[Any]]:
    """Bytes that this rank sends in the collectives of each group, as in a ring."""
    sent: Counter[Any] = Counter()
    originals = {name: getattr(dist, name) for name in OPERATIONS}

    def counting(name: str) -> Any:
        index, factor = OPERATIONS[name]

        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            size = dist.get_world_size(group)
            sent[group] += factor * args[index].nbytes * (size - 1) // size
            return originals[name](*args, group=group, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _of_context(trainer: PolicyTrainer, draft: str | None, size: int, num_responses: int, num_depths: int) -> int:
    """Bytes for ``NUM_TOKENS`` tokens and ``num_responses`` response tokens among ``size`` ranks."""
    spec = trainer.spec
    keys, hidden = 2 * spec.num_kv_heads * spec.head_dim, spec.hidden_size
    # Keys and values of every layer: gathered in both directions, and their gradients scattered.
    numbers = spec.num_layers * 3 * keys * NUM_TOKENS
    # Log-prob and entropy of a response token, in an all-reduce.
    numbers += 2 * 2 * num_responses
    # The first tokens of each chunk, for the rank of the chunk before.
    behind = 2 * size * num_depths * hidden
    if draft == "mtp":
        # Keys of the draft; two rows of its acceptance for each depth, in float64 and an all-reduce.
        numbers += 2 * keys * NUM_TOKENS + 2 * behind + 2 * 2 * 2 * num_depths * NUM_TOKENS
    if draft == "dflash":
        numbers += 2 * hidden * NUM_TOKENS + behind
    return numbers * FLOAT * (size - 1) // size


def _check_context(_rank: int, path: Path, draft: str | None, size: int) -> None:
    ranks = parallel.lay_out(1, torch.device("cpu"), size)
    config = make_config(path, cp=size, draft=draft)
    config.trainer.max_tokens_per_microbatch = 1000
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    batch = batch_of_lengths(np.random.default_rng(0), np.array([4, 10]), np.array([20, 14]))
    assert batch.lengths.sum() == NUM_TOKENS
    with counted() as sent:
        trainer.forward_backward(batch)
    num_depths = 0 if trainer.draft is None else trainer.draft.draft.num_positions
    assert sent[ranks.cp_group] == _of_context(trainer, draft, size, int(batch.loss_mask.sum()), num_depths)


@pytest.mark.parametrize("draft", [None, "mtp", "dflash"])
def test_context_parallelism_sends_keys_and_values(tmp_path: Path, draft: str | None) -> None:
    run_distributed(_check_context, 2, write_model(tmp_path / "model", draft or "mtp"), draft, 2)


def _check_tensor(_rank: int, path: Path) -> None:
    ranks = parallel.lay_out(2, torch.device("cpu"))
    config = make_config(path, tp=2, draft=None)
    config.trainer.max_tokens_per_microbatch = 1000
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    batch = batch_of_lengths(np.random.default_rng(0), np.array([4, 10]), np.array([20, 14]))
    with counted() as sent:
        trainer.forward_backward(batch)
    spec = trainer.spec
    # Two all-reduces of a layer's states in each direction, one behind the embedding, and the head's gradient of a
    # response token. All-reduces of numbers for each token are all-gathers of another kind, which are not counted.
    numbers = spec.hidden_size * ((4 * spec.num_layers + 1) * NUM_TOKENS + int(batch.loss_mask.sum()))
    assert sent[ranks.tp_group] == 2 * numbers * FLOAT * (2 - 1) // 2


def test_tensor_parallelism_sends_states(tmp_path: Path) -> None:
    run_distributed(_check_tensor, 2, write_model(tmp_path / "model", "mtp"))
