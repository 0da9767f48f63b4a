"""Copies of a draft: their scores are those of the weights that they are, and training does not notice them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.metrics import names
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import CANDIDATE, EARLIER, FROZEN, TrainBatch

# Rows that fit into one micro-batch of 1000 tokens, so that the predicted length of a step is that of its micro-batch.
ONE_MICRO_BATCH = 1000


def _weights(trainer: PolicyTrainer) -> list[torch.Tensor]:
    assert trainer.draft is not None
    modules = (trainer.model, trainer.draft.draft.module)
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def _equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _check(_rank: int, path: Path, draft: str, tp: int, dtype: str) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    config = make_config(path, tp=tp, draft=draft, dtype=dtype, distributed=dtype == "bf16")
    config.trainer.max_tokens_per_microbatch = ONE_MICRO_BATCH
    for optimizer in (config.trainer.mtp.optimizer_config, config.trainer.dflash.optimizer_config):
        # So large that the draft is another one after a step.
        optimizer.lr, optimizer.max_grad_norm = 3e-2, 1.0
    trainer, plain = (PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10) for _ in range(2))
    predicted = []
    for step in range(3):
        if step == 1:
            trainer.draft_copies.keep(EARLIER)
        scored = (CANDIDATE, FROZEN, EARLIER) if step == 2 else ()
        report = trainer.train_mini_batch(make_batch(step), scored=scored)
        predicted.append(values(plain.train_mini_batch(make_batch(step)).metrics)[names.PREDICTED_ACCEPTANCE_LENGTH])
        assert _equal(_weights(trainer), _weights(plain))
    scores = values(report.metrics)

    def expected(steps: int) -> float:
        """The predicted length of the last batch, of a draft that was trained in the first ``steps`` steps only."""
        other = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
        for step in range(2):
            other.train_mini_batch(make_batch(step), draft=step < steps)
        return values(other.train_mini_batch(make_batch(2)).metrics)[names.PREDICTED_ACCEPTANCE_LENGTH]

    frozen, earlier = expected(0), expected(1)
    assert scores[names.scored_acceptance_length(FROZEN)] == pytest.approx(frozen, abs=1e-9)
    assert scores[names.scored_acceptance_length(EARLIER)] == pytest.approx(earlier, abs=1e-9)
    # They differ, and the draft after the step is none of them.
    found = {
        round(value, 6) for value in (frozen, earlier, predicted[2], scores[names.scored_acceptance_length(CANDIDATE)])
    }
    assert len(found) == 4
    _check_restore(trainer, plain, make_batch(3))


def _check_restore(trainer: PolicyTrainer, plain: PolicyTrainer, batch: TrainBatch) -> None:
    """A draft that is set back has the weights of the copy, and its next update starts from there."""
    assert trainer.draft is not None
    trainer.draft_copies.keep("now")
    before = _weights(trainer)
    trainer.train_mini_batch(batch)
    assert not _equal(_weights(trainer), before)
    moved_policy = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.draft_copies.restore("now")
    draft_before = before[len(moved_policy) :]
    assert _equal(_weights(trainer), moved_policy + draft_before)
    for group in trainer.draft.trainable.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.train_mini_batch(batch)
    # Without a learning rate an update copies the optimizer's own weights to the module.
    assert _equal(_weights(trainer)[len(moved_policy) :], draft_before)


@pytest.mark.parametrize(
    ("draft", "ranks", "tp", "dtype"),
    [("mtp", 1, 1, "fp32"), ("mtp", 2, 2, "fp32"), ("mtp", 2, 1, "bf16"), ("dflash", 2, 1, "fp32")],
)
def test_copies_are_scored_beside_the_training(tmp_path: Path, draft: str, ranks: int, tp: int, dtype: str) -> None:
    run_distributed(_check, ranks, write_model(tmp_path / "model", draft), draft, tp, dtype)
