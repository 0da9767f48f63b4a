"""The FLOPs of the plan, against those that PyTorch counts in training steps of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import VOCAB_SIZE, batch_of_lengths, make_config, write_model
from torch.utils.flop_counter import FlopCounterMode

from skyrl_spec.drafts.kinds import KINDS
from skyrl_spec.models import parallel
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.flops import Flops, policy_training
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

PROMPT, RESPONSE, NUM_DOCUMENTS = 12, 80, 12


def _pairs(query: tuple[int, ...], key: tuple[int, ...], is_causal: bool) -> float:
    _, heads, num_queries, head_dim = query
    seen = num_queries * (num_queries + 1) / 2 if is_causal else num_queries * key[2]
    return seen * heads * head_dim


def _forward(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> float:
    return 4 * _pairs(query, key, is_causal)


def _backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout: float, is_causal: bool, *_: Any, **__: Any
) -> float:
    return 10 * _pairs(query, key, is_causal)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def _config(path: Path, draft: str | None, share: float) -> Config:
    config = make_config(path, draft=draft)
    config.trainer.mtp.positions_per_step = config.trainer.dflash.positions_per_step = share
    # Blocks of a pack fit into one pass of the draft, so that no document is read twice.
    config.trainer.max_tokens_per_microbatch, config.trainer.dflash.anchors_per_sequence = 1200, 12
    return config


def _counted(ranks: Parallel, path: Path, draft: str | None, share: float, num_steps: int) -> Flops:
    """Mean of a training step."""
    config = _config(path, draft, share)
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    prompts, responses = np.full(NUM_DOCUMENTS, PROMPT), np.full(NUM_DOCUMENTS, RESPONSE)
    batch = batch_of_lengths(np.random.default_rng(0), prompts, responses, vocab_size=VOCAB_SIZE)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        for _ in range(num_steps):
            trainer.forward_backward(batch)
    counts = {str(op): flops / num_steps for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counts.items() if "attention" in op)
    return Flops(sum(counts.values()) - attention, attention)


def _check(_rank: int, path: Path, draft: str, share: float) -> None:
    num_steps, ranks = 1 if share == 1 else 8, parallel.lay_out(1, torch.device("cpu"))
    policy, both = _counted(ranks, path, None, share, 1), _counted(ranks, path, draft, share, num_steps)
    config = _config(path, draft, share)
    spec = load_spec(str(path))
    planned = policy_training(spec, PROMPT, RESPONSE)
    assert policy.products / NUM_DOCUMENTS == pytest.approx(planned.products, rel=0.05)
    assert policy.attention / NUM_DOCUMENTS == pytest.approx(planned.attention, rel=0.02)
    of_draft = KINDS[draft].training_flops(config, spec, PROMPT, RESPONSE)
    products = (both.products - policy.products) / NUM_DOCUMENTS
    assert products == pytest.approx(of_draft.products, rel=0.05), (products, of_draft)
    if draft == "mtp":
        # DFlash's blocks attend with masks on a CPU, so that masked pairs are computed too.
        assert (both.attention - policy.attention) / NUM_DOCUMENTS == pytest.approx(of_draft.attention, rel=0.05)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_the_plan_counts_what_pytorch_counts(tmp_path: Path, draft: str, share: float) -> None:
    run_distributed(_check, 1, write_model(tmp_path / "model", draft), draft, share)
