"""A batch without old log-probs: the update's own forward pass gives them, and the ratio is 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.data.packing import shard_rows
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer


def _trainer(path: Path, ranks: parallel.Parallel, *, reference: bool) -> PolicyTrainer:
    config = make_config(path, tp=ranks.tp_size)
    config.trainer.algorithm.use_kl_loss = reference
    return PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)


def _check(_rank: int, path: Path, tp: int, reference: bool) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    batch = replace(make_batch(seed=0), policy_logprobs=None)
    trainer = _trainer(path, ranks, reference=reference)
    known = trainer.forward_logprobs(batch)
    rows = shard_rows(batch.lengths, ranks.dp_size)[ranks.dp_rank]
    whole = {name: np.zeros(batch.token_ids.shape, np.float32) for name in known}
    for name, shard in known.items():
        whole[name][rows] = shard
    without = {name: array for name, array in whole.items() if name != "policy_logprobs"}
    assert trainer.forward_logprobs(batch, policy=False).keys() == without.keys()

    wanted = trainer.train_mini_batch(replace(batch, **whole))
    again = _trainer(path, ranks, reference=reference)
    got = again.train_mini_batch(replace(batch, **without))
    assert wanted.policy_logprobs is None
    np.testing.assert_allclose(got.policy_logprobs, known["policy_logprobs"], rtol=1e-6)
    assert values(got.metrics) == pytest.approx(values(wanted.metrics), rel=1e-5)
    assert values(got.metrics)["policy/clip_ratio"] == 0
    for mine, theirs in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("ranks", "tp", "reference"), [(1, 1, True), (2, 2, False), (2, 1, True)])
def test_an_update_without_old_logprobs_is_that_with_them(tmp_path: Path, ranks: int, tp: int, reference: bool) -> None:
    run_distributed(_check, ranks, write_model(tmp_path / "model", "mtp"), tp, reference)
