"""``fp32_output_head`` reaches log-probs, draft loss and canary scores of a bf16 trainer, over one and two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.metrics import names
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import Generation, Proposals, Versions

PROPOSAL = Proposals(
    [5, 6, 7], Generation([8, 9, 10, 11], [0.0] * 4, "length", Versions()), [3], [[9, 10, 11]], [[0.0] * 3]
)


def _build(path: Path, ranks: Parallel, draft: str, fp32_head: bool | None) -> PolicyTrainer:
    torch.manual_seed(0)
    config = make_config(path, tp=ranks.tp_size, draft=draft, dtype="bf16")
    config.trainer.policy.megatron_config.fp32_output_head = fp32_head
    return PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)


def _results(trainer: PolicyTrainer) -> dict[str, np.ndarray]:
    batch = make_batch(seed=0)
    scores = trainer.score_proposals([PROPOSAL])
    return {
        "log-probs": trainer.forward_logprobs(batch)["policy_logprobs"][batch.loss_mask],
        "draft loss": np.array(values(trainer._reduce(trainer.forward_backward(batch)))[names.DRAFT_LOSS]),
        "canary, policy": scores.policy_logprobs,
        "canary, draft": scores.draft_logprobs,
    }


def _check(_rank: int, path: Path, draft: str, tp: int) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    wide, rounded, default = (_results(_build(path, ranks, draft, fp32_head)) for fp32_head in (True, False, None))
    for name, value in wide.items():
        # Rounding bf16 logits of a tiny model changes results by less than 0.02, and by more than fp32 rounding.
        difference = np.abs(value - rounded[name]).max()
        assert 1e-6 < difference < 0.02, (name, difference)
        # The default on a CPU is off.
        np.testing.assert_array_equal(default[name], rounded[name])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_the_setting_reaches_everything_that_makes_logits(tmp_path: Path, draft: str, tp: int) -> None:
    run_distributed(_check, tp, write_model(tmp_path / "model", draft), draft, tp)
