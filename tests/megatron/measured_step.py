"""Prints the bytes of this process in a training step, beyond those of the frameworks: ``PEAK LASTING``.

    python measured_step.py experiment=cpu_search_grpo

One full pack of the longest documents is trained on, with policy and draft.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.models import parallel
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.derived import longest_sequence
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch


def resident(which: str) -> int:
    """Bytes of the process: now (``VmRSS``), or the most since ``forget_peak`` (``VmHWM``)."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    # Memory that the allocator keeps is not the step's.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def full_batch(config: Config, vocab_size: int) -> TrainBatch:
    """Documents of the greatest length that fill a pack."""
    length, prompt = longest_sequence(config), config.trainer.max_prompt_length
    shape = (max(1, config.trainer.max_tokens_per_microbatch // length), length)
    rng, mask_BS = np.random.default_rng(0), np.zeros(shape, bool)
    mask_BS[:, prompt:] = True
    return TrainBatch(
        token_ids=rng.integers(0, vocab_size, shape),
        lengths=np.full(shape[0], length),
        loss_mask=mask_BS,
        loss_weights=token_weights(mask_BS, "token_mean", length),
        advantages=rng.normal(size=shape) * mask_BS,
        rollout_logprobs=-1.0 * mask_BS,
        policy_logprobs=-1.0 * mask_BS,
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    config = load_config(sys.argv[1:])
    store = torch.distributed.HashStore()
    device = torch.device("cpu")
    ranks = parallel.initialize(
        rank=0, world_size=1, tensor_parallel_size=1, device=device, store=store, timeout_s=60.0
    )
    spec = load_spec(config.trainer.policy.model.path)
    forget_peak()
    before = resident("VmRSS")
    trainer = PolicyTrainer(config, spec, ranks, total_optimizer_steps=10)
    batch = full_batch(config, spec.vocab_size)
    # The first step makes the optimizer's state.
    trainer.train_mini_batch(batch)
    forget_peak()
    lasting = resident("VmRSS") - before
    trainer.train_mini_batch(batch)
    print(resident("VmHWM") - before, lasting)


if __name__ == "__main__":
    main()
