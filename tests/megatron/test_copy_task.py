"""A task with a known answer is learned from packs, by the policy completely: nothing is off by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import VOCAB_SIZE, make_config, write_model

from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.metrics import names
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

PROMPT, LONGEST, NUM_ROWS, NUM_STEPS = 4, 16, 48, 400


def _copies(rng: np.random.Generator) -> TrainBatch:
    """Responses that repeat their prompt, of random lengths. All are right, so all have the same advantage."""
    lengths = PROMPT + rng.integers(1, LONGEST + 1, NUM_ROWS)
    positions = np.arange(PROMPT + LONGEST)
    prompts = rng.integers(2, VOCAB_SIZE, (NUM_ROWS, PROMPT))
    is_token = positions < lengths[:, None]
    loss_mask = is_token & (positions >= PROMPT)
    return TrainBatch(
        token_ids=np.where(is_token, prompts[:, positions % PROMPT], 0),
        lengths=lengths,
        loss_mask=loss_mask,
        loss_weights=token_weights(loss_mask, "token_mean", LONGEST),
        advantages=loss_mask.astype(np.float32),
        rollout_logprobs=np.zeros(loss_mask.shape, np.float32),
        policy_logprobs=None,
    )


def _check(_rank: int, path: Path, draft: str) -> None:
    torch.manual_seed(0)
    config = make_config(path, draft=draft)
    trainer_config = config.trainer
    for optimizer in (trainer_config.policy, trainer_config.mtp, trainer_config.dflash):
        optimizer.optimizer_config.lr, optimizer.optimizer_config.max_grad_norm = 2e-3, 1.0
    trainer_config.max_tokens_per_microbatch = 256
    trainer = PolicyTrainer(config, load_spec(str(path)), parallel.lay_out(1, torch.device("cpu")), NUM_STEPS)
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        report = trainer.train_mini_batch(_copies(rng))
    unseen = _copies(rng)
    logprobs = trainer.forward_logprobs(unseen)["policy_logprobs"][unseen.loss_mask]
    # What has more than half of the probability is the most probable token.
    assert (logprobs > np.log(0.5)).mean() == 1.0, np.exp(logprobs).min()
    metrics = values(report.metrics)
    # The draft has not learned everything yet. Off by one, it would be right once in VOCAB_SIZE times.
    for position in range(1, 4):
        assert metrics[names.draft_top1_pos(position)] > 0.8, metrics


@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_copies_are_learned(tmp_path: Path, draft: str) -> None:
    run_distributed(_check, 1, write_model(tmp_path / "model", draft), draft, timeout_s=300.0)
