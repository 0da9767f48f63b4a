"""Training on packs: budgets change nothing but rounding, and a task with a known answer is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import batch_of_lengths, make_config, write_model

from skyrl_spec.data.packing import shard_rows
from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

# Of prompts and responses. With a prompt alone (0), and longer than the budget of 24.
PROMPTS = np.array([1, 1, 2, 5, 3, 1, 4, 6, 9])
RESPONSES = np.array([0, 1, 1, 19, 22, 23, 30, 0, 7])
TOLERANCE = 1e-5


def _record(path: Path, ranks: parallel.Parallel, draft: str, budget: int, batch: TrainBatch) -> dict[str, Any]:
    """Sums, gradients and log-probs of one batch."""
    ep = torch.distributed.get_world_size(ranks.ep_group)
    config = make_config(path, tp=ranks.tp_size, cp=ranks.cp_size, ep=ep, draft=draft)
    config.trainer.max_tokens_per_microbatch = budget
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    assert trainer.draft is not None
    logprobs = trainer.forward_logprobs(batch)["policy_logprobs"]
    metrics = values(trainer._reduce(trainer.forward_backward(batch)))
    modules = {"policy": trainer.model, "draft": trainer.draft.draft.module}
    gradients = {
        f"{component}.{name}": parameter.main_grad.clone()
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    return {"metrics": metrics, "gradients": gradients, "logprobs": logprobs}


def _check_budgets(_rank: int, path: Path, draft: str, tp: int, cp: int, ep: int = 1, masked: int = -1) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"), cp, expert_parallel_size=ep)
    batch = batch_of_lengths(np.random.default_rng(0), PROMPTS, RESPONSES, untrained_row=3)
    if masked >= 0:
        batch.loss_mask[shard_rows(batch.lengths, 2)[masked]] = False
        batch = replace(batch, loss_weights=token_weights(batch.loss_mask, "token_mean", 1))
    alone = _record(path, ranks, draft, 1, batch)
    assert alone["metrics"]["draft/loss"] > 0
    order = np.random.default_rng(1).permutation(len(batch))
    for budget, rows in ((24, None), (1000, None), *([(24, order)] if masked < 0 else [])):
        # Random blocks belong to a row of the batch, so that the order may change only where all are trained.
        packed = _record(path, ranks, draft, budget, batch if rows is None else batch.select(rows))
        for name, value in alone["metrics"].items():
            assert packed["metrics"][name] == pytest.approx(value, rel=TOLERANCE, nan_ok=True), (budget, name)
        for name, wanted in alone["gradients"].items():
            assert (packed["gradients"][name] - wanted).norm() < TOLERANCE * wanted.norm(), (budget, name)
        if rows is None:
            np.testing.assert_allclose(packed["logprobs"], alone["logprobs"], atol=TOLERANCE)


@pytest.mark.parametrize(("tp", "cp", "tied"), [(1, 1, False), (1, 1, True), (2, 1, False), (1, 2, False)])
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_packs_give_what_documents_alone_give(tmp_path: Path, draft: str, tp: int, cp: int, tied: bool) -> None:
    """Losses, metrics, every gradient and log-probs, for documents of 1 token to more than the budget, in any order."""
    model = write_model(tmp_path / "model", draft, tied=tied)
    run_distributed(_check_budgets, tp * cp, model, draft, tp, cp)


@pytest.mark.parametrize(("ep", "masked"), [(1, -1), (2, -1), (2, 0)], ids=["whole", "ep2", "ep2, a rank without loss"])
def test_packs_of_a_mixture_give_what_documents_alone_give(tmp_path: Path, ep: int, masked: int) -> None:
    """Ranks that divide experts have packs of their own, and as many."""
    model = write_model(tmp_path / "model", "dflash", has_experts=True)
    run_distributed(_check_budgets, ep, model, "dflash", 1, 1, ep, masked)


def _copies(seed: int) -> TrainBatch:
    """Documents of several lengths: a prompt that ends with token 1, and a response that repeats what is before it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 5, 64)
    batch = batch_of_lengths(rng, lengths + 1, lengths)
    for row, length in enumerate(lengths):
        text = rng.integers(2, 10, length)
        batch.token_ids[row, : 2 * length + 1] = [*text, 1, *text]
    return batch


def _check_copy(_rank: int, path: Path) -> None:
    config = make_config(path, draft=None)
    optimizer = config.trainer.policy.optimizer_config
    optimizer.lr, optimizer.max_grad_norm, optimizer.scheduler = 3e-3, 1.0, "cosine"
    config.trainer.max_tokens_per_microbatch, config.trainer.logprobs_chunk_size = 200, 200
    num_steps = 500
    trainer = PolicyTrainer(config, load_spec(str(path)), parallel.lay_out(1, torch.device("cpu")), num_steps)
    for step in range(num_steps):
        batch = _copies(step)
        # With an advantage of 1 everywhere the gradient is that of the log-likelihood.
        weights = token_weights(batch.loss_mask, "token_mean", 100)
        batch = replace(
            batch, advantages=batch.loss_mask.astype(np.float32), loss_weights=weights, policy_logprobs=None
        )
        trainer.train_mini_batch(batch)
    batch = _copies(seed=10_000)
    logprobs = trainer.forward_logprobs(batch)["policy_logprobs"][batch.loss_mask]
    # More than half of the probability is on the right token, so that it is the favourite.
    assert (logprobs > np.log(0.5)).all(), f"{(logprobs > np.log(0.5)).mean():.1%} of the tokens are copied"


def test_copying_is_learned_to_the_last_token(tmp_path: Path) -> None:
    """A log-prob, mask or position that is off by one cannot learn it."""
    run_distributed(_check_copy, 1, write_model(tmp_path / "model", "mtp"), timeout_s=300.0)
