"""Nothing in the loop over micro-batches makes the host wait for a device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from host_waits import HostWaits
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.algorithms.policy_loss import POLICY_LOSSES, ResponseTokens
from skyrl_spec.drafts import block_attention, dflash, mtp
from skyrl_spec.losses import vocab_parallel
from skyrl_spec.models import parallel
from skyrl_spec.models import upload as uploads
from skyrl_spec.settings.algorithm import AlgorithmConfig
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training import trainer
from skyrl_spec.training.trainer import PolicyTrainer

Waits = Counter[str]


def _waits(one: PolicyTrainer, num_rows: int) -> Waits:
    """Waits in an update of so many micro-batches, one row each."""
    batch = make_batch(0, num_rows)
    modules = [one.model, *([one.draft.draft.module] if one.draft is not None else [])]
    parameters = [parameter for module in modules for parameter in (*module.parameters(), *module.buffers())]
    gradients = [parameter.main_grad for parameter in parameters if hasattr(parameter, "main_grad")]
    mode = HostWaits([*parameters, *gradients])

    def upload(item: Any, device: torch.device) -> Any:
        # The copy from pinned memory does not wait.
        copy = uploads.copied(item, device)
        mode.mark(uploads._tensors(copy))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, dflash, mtp, block_attention):
            patch.setattr(module, "upload", upload)
        # As on a GPU.
        patch.setattr(vocab_parallel, "host_knows", lambda tensor: not mode._is_marked(tensor))
        with mode:
            one.train_mini_batch(batch)
    return mode.places


def _per_micro_batch(path: Path, draft: str, tp: int) -> Waits:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    config = make_config(path, tp=tp, draft=draft)
    config.trainer.max_tokens_per_microbatch = 1
    one = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    # The optimizer makes its state.
    one.train_mini_batch(make_batch(0))
    nine, five = _waits(one, 9), _waits(one, 5)
    # Some in an update, to read its sums and norms.
    assert 0 < five.total() < 60
    return nine - five


def _check(_rank: int, path: Path, draft: str, tp: int) -> None:
    waits = _per_micro_batch(path, draft, tp)
    assert not waits, waits


def _check_planted(_rank: int, path: Path, draft: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        regular = POLICY_LOSSES["regular"]

        def reads_a_number(tokens: ResponseTokens, algorithm: AlgorithmConfig) -> Any:
            assert tokens.policy_logprobs_N.sum() <= 0
            return regular(tokens, algorithm)

        patch.setitem(POLICY_LOSSES, "regular", reads_a_number)
        waits = _per_micro_batch(path, draft, 1)
        assert waits.total() == 4, waits


@pytest.mark.parametrize(("draft", "tp"), [("mtp", 2), ("dflash", 1)])
def test_a_micro_batch_has_no_wait(tmp_path: Path, draft: str, tp: int) -> None:
    run_distributed(_check, tp, write_model(tmp_path / "model", draft), draft, tp)


def test_a_planted_wait_is_counted(tmp_path: Path) -> None:
    run_distributed(_check_planted, 1, write_model(tmp_path / "model", "mtp"), "mtp")
