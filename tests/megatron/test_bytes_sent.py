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
from tiny_checkpoints import EXPERTS_PER_TOKEN, NUM_EXPERTS, batch_of_lengths, make_config, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from skyrl_spec.data.packing import shard_rows
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

FLOAT, NUM_TOKENS = 4, 48
# Index of the argument that has the whole tensor, and the share of its bytes that a rank of R sends, times R / (R - 1).
OPERATIONS = {"all_reduce": (0, 2), "all_gather_into_tensor": (0, 1), "reduce_scatter_tensor": (1, 1)}


@contextmanager
def counted() -> Iterator[Counter[Any]]:
    """Bytes that this rank sends in each group: in collectives as in a ring, and from rank to rank."""
    sent: Counter[Any] = Counter()

    def counting(name: str) -> Any:
        index, factor = OPERATIONS[name]

        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            size = dist.get_world_size(group)
            sent[group] += factor * args[index].nbytes * (size - 1) // size
            return real[name](*args, group=group, **kwargs)

        return call

    def isend(tensor: Tensor, dst: int, group: Any = None) -> Any:
        sent[group] += tensor.nbytes
        return real["isend"](tensor, dst, group=group)

    def point_to_point(operation: Any, tensor: Tensor, peer: int, group: Any = None) -> Any:
        if operation is not isend:
            return real["P2POp"](operation, tensor, peer, group)
        sent[group] += tensor.nbytes
        return real["P2POp"](real["isend"], tensor, peer, group)

    def all_to_all_single(output: Tensor, tensor: Tensor, *, input_split_sizes: Any, group: Any, **splits: Any) -> Any:
        rows = sum(input_split_sizes) - input_split_sizes[dist.get_rank(group)]
        sent[group] += rows * tensor[:1].nbytes
        return real["all_to_all_single"](output, tensor, input_split_sizes=input_split_sizes, group=group, **splits)

    replaced = {name: counting(name) for name in OPERATIONS}
    replaced |= {"isend": isend, "P2POp": point_to_point, "all_to_all_single": all_to_all_single}
    real = {name: getattr(dist, name) for name in replaced}
    for name, replacement in replaced.items():
        setattr(dist, name, replacement)
    try:
        yield sent
    finally:
        for name, original in real.items():
            setattr(dist, name, original)


def _batch_and_trainer(path: Path, draft: str | None, ranks: parallel.Parallel, **sizes: int) -> tuple[Any, Any]:
    config = make_config(path, draft=draft, **sizes)
    config.trainer.max_tokens_per_microbatch = 1000
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    return batch_of_lengths(np.random.default_rng(0), np.array([4, 10]), np.array([20, 14])), trainer


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
    batch, trainer = _batch_and_trainer(path, draft, ranks, cp=size)
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
    batch, trainer = _batch_and_trainer(path, None, ranks, tp=2)
    with counted() as sent:
        trainer.forward_backward(batch)
    spec = trainer.spec
    # Two all-reduces of a layer's states in each direction, one behind the embedding, and the head's gradient of a
    # response token. All-reduces of numbers for each token are all-gathers of another kind, which are not counted.
    numbers = spec.hidden_size * ((4 * spec.num_layers + 1) * NUM_TOKENS + int(batch.loss_mask.sum()))
    assert sent[ranks.tp_group] == 2 * numbers * FLOAT * (2 - 1) // 2


def test_tensor_parallelism_sends_states(tmp_path: Path) -> None:
    run_distributed(_check_tensor, 2, write_model(tmp_path / "model", "mtp"))


def _check_stages(rank: int, path: Path, draft: str | None) -> None:
    ranks = parallel.lay_out(1, torch.device("cpu"), pipeline_parallel_size=2)
    batch, trainer = _batch_and_trainer(path, draft, ranks, pp=2)
    with counted() as sent:
        trainer.forward_backward(batch)
    states = trainer.spec.hidden_size * NUM_TOKENS * FLOAT
    # States to the last stage, and their gradients back.
    assert sent[ranks.pp_group] == states
    # The draft reads both layers, and one of them is on the first stage.
    assert sent[ranks.side_group] == (states if draft == "dflash" and rank == 0 else 0)


@pytest.mark.parametrize("draft", [None, "mtp", "dflash"])
def test_a_pipeline_sends_states_and_what_the_draft_reads(tmp_path: Path, draft: str | None) -> None:
    run_distributed(_check_stages, 2, write_model(tmp_path / "model", draft or "mtp"), draft)


def _copies_for_others(path: Path, batch: Any) -> int:
    """Tokens times their experts that are not on the token's rank, by transformers."""
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), 0
    for rank, rows in enumerate(shard_rows(batch.lengths, 2)):
        for row in rows:
            token_ids = torch.from_numpy(batch.token_ids[row][: batch.lengths[row]])[None]
            with torch.no_grad():
                logits = model(token_ids, output_router_logits=True).router_logits
            chosen = torch.stack([of_layer.topk(EXPERTS_PER_TOKEN, dim=-1).indices for of_layer in logits])
            found += int((chosen // (NUM_EXPERTS // 2) != rank).sum())
    return found


def _check_experts(_rank: int, path: Path) -> None:
    ranks = parallel.lay_out(1, torch.device("cpu"), expert_parallel_size=2)
    batch, trainer = _batch_and_trainer(path, "dflash", ranks, ep=2)
    with counted() as sent:
        trainer.forward_backward(batch)
    total = torch.tensor(sent[ranks.ep_group])
    dist.all_reduce(total)
    # A copy and its weight to the expert, its output back, and the gradients of all three.
    assert total == _copies_for_others(path, batch) * (4 * trainer.spec.hidden_size + 2) * FLOAT


def test_experts_get_copies_of_tokens(tmp_path: Path) -> None:
    run_distributed(_check_experts, 2, write_model(tmp_path / "model", "dflash", has_experts=True))
