"""A gradient that is not finite skips one update of its own optimizer, and none of the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.errors import RunError
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch


def _build(path: Path, distributed: bool) -> PolicyTrainer:
    torch.manual_seed(0)
    ranks = parallel.lay_out(1, torch.device("cpu"))
    config = make_config(path, distributed=distributed)
    config.trainer.max_skipped_updates = 2
    return PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)


def _weights(trainer: PolicyTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    assert trainer.draft is not None
    modules = (trainer.model, trainer.draft.draft.module)
    return tuple(torch.cat([p.detach().flatten() for p in module.parameters()]) for module in modules)  # type: ignore[return-value]


def _broken() -> TrainBatch:
    """One row's advantage is not a number."""
    batch = make_batch(seed=0)
    batch.advantages[0] = np.nan
    return batch


def _check_policy(rank: int, path: Path, distributed: bool) -> None:
    trainer = _build(path, distributed)
    policy, draft = _weights(trainer)
    for _ in range(2):
        metrics = values(trainer.train_mini_batch(_broken()).metrics)
        assert (metrics["policy/skipped_updates"], metrics["draft/skipped_updates"]) == (1, 0)
        assert np.isnan(metrics["policy/grad_norm"])
        assert metrics["draft/grad_norm"] > 0
    assert torch.equal(_weights(trainer)[0], policy)
    assert not torch.equal(_weights(trainer)[1], draft)
    # An update between starts the count again.
    metrics = values(trainer.train_mini_batch(make_batch(seed=0)).metrics)
    assert (metrics["policy/skipped_updates"], metrics["policy/lr"]) == (0, 1e-3)
    assert not torch.equal(_weights(trainer)[0], policy)
    for _ in range(2):
        trainer.train_mini_batch(_broken())
    with pytest.raises(RunError, match=r"=2: 3 updates .* norm of PolicyModel is not finite \(nan\)"):
        trainer.train_mini_batch(_broken())


def _check_draft(_rank: int, path: Path) -> None:
    trainer = _build(path, distributed=False)
    assert trainer.draft is not None
    policy, draft = _weights(trainer)
    parameters = trainer.draft.draft.module.parameters()
    handles = [parameter.register_hook(lambda gradient: gradient * torch.inf) for parameter in parameters]
    metrics = values(trainer.train_mini_batch(make_batch(seed=0)).metrics)
    assert (metrics["policy/skipped_updates"], metrics["draft/skipped_updates"]) == (0, 1)
    assert not torch.equal(_weights(trainer)[0], policy)
    assert torch.equal(_weights(trainer)[1], draft)
    for handle in handles:
        handle.remove()
    assert values(trainer.train_mini_batch(make_batch(seed=1)).metrics)["draft/skipped_updates"] == 0
    assert not torch.equal(_weights(trainer)[1], draft)


@pytest.mark.parametrize(("distributed", "num_ranks"), [(False, 1), (True, 2)])
def test_a_bad_gradient_of_the_policy(tmp_path: Path, distributed: bool, num_ranks: int) -> None:
    run_distributed(_check_policy, num_ranks, write_model(tmp_path / "model", "mtp"), distributed)


def test_a_bad_gradient_of_the_draft(tmp_path: Path) -> None:
    run_distributed(_check_draft, 1, write_model(tmp_path / "model", "mtp"))
