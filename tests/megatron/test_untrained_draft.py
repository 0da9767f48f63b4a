"""A step that leaves the draft alone: the policy's update is that of any other step, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer


def _check(_rank: int, path: Path, draft: str, tp: int) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    config = make_config(path, tp=tp, draft=draft)
    trainer, other = (PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10) for _ in range(2))
    assert trainer.draft is not None
    for step in range(3):
        before = [parameter.clone() for parameter in trainer.draft.draft.module.parameters()]
        report = trainer.train_mini_batch(make_batch(step), draft=step == 1)
        expected = other.train_mini_batch(make_batch(step))
        moved = [
            not torch.equal(old, new) for old, new in zip(before, trainer.draft.draft.module.parameters(), strict=True)
        ]
        assert all(moved) if step == 1 else not any(moved)
        metrics, wanted = values(report.metrics), values(expected.metrics)
        assert metrics.keys() >= {key for key in wanted if key.startswith("policy/")}
        assert all(value == wanted[key] for key, value in metrics.items() if key.startswith("policy/"))
        assert ("draft/loss" in metrics) == (step == 1)
        assert step == 1 or report.draft_train_s == 0
        for mine, theirs in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("draft", "ranks", "tp"), [("mtp", 1, 1), ("mtp", 2, 2), ("dflash", 2, 1)])
def test_a_step_without_the_draft_trains_the_same_policy(tmp_path: Path, draft: str, ranks: int, tp: int) -> None:
    run_distributed(_check, ranks, write_model(tmp_path / "model", draft), draft, tp)
