"""Checks of a worker that offloads: what goes to host memory comes back the same, and frees the GPU meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Check, Figure, synchronize
from measures import row_length
from real_shapes import MODELS, build_trainer, make_rows, write_configs
from training import equal_with, of_each_draft

from skyrl_spec.settings.schema import Config
from skyrl_spec.training.trainer import PolicyTrainer

NUM_CYCLES, NUM_LAYERS = 3, 2
# Of the memory that a worker holds between steps. Buffers, such as those of RoPE, stay.
LEFT_LIMIT = 0.05
GIB = 2**30


def offload_everything(config: Config) -> Config:
    """The settings that ``colocate_all`` makes."""
    trainer = config.trainer
    trainer.policy.megatron_config.cpu_offload = True
    for part in (trainer.policy, trainer.mtp, trainer.dflash):
        part.optimizer_config.offload_after_step = True
    return config


def cycles(device: torch.device, folder: Path, model: str) -> Figure:
    """Share of the worker's memory that stays on the device while engines would sample, over three training steps."""
    shapes = MODELS[model]
    length = row_length(device)
    config = offload_everything(
        write_configs(shapes, folder / "model", NUM_LAYERS, small=device.type != "cuda", length=length)
    )
    trainer = build_trainer(config, device)
    batch = make_rows(config, trainer.spec.vocab_size, 2)
    trainer.train_mini_batch(batch)
    synchronize(device)
    held = _held(trainer, device)
    seconds: dict[str, float] = {}
    left = 0.0
    for _ in range(NUM_CYCLES):
        seconds["state to the host"] = _timed(trainer.offload.training_state, device)
        seconds["weights to the host"] = _timed(trainer.offload.weights, device)
        left = max(left, _held(trainer, device) / held)
        seconds["weights back"] = _timed(partial(trainer.offload.require, trainer.model), device)
        seconds["step, with the state on its way"] = _timed(partial(trainer.train_mini_batch, batch), device)
    seconds["step"] = _timed(partial(trainer.train_mini_batch, batch), device)
    return Figure(left, LEFT_LIMIT, "of the memory", details={"held, GiB": held / GIB, "seconds": seconds})


def _held(trainer: PolicyTrainer, device: torch.device) -> float:
    """Bytes on the device. On a CPU, which stands in for one, those of the weights and gradients."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    assert trainer.policy is not None
    tensors = [*trainer.model.parameters(), *(buffer.grad_data for buffer in trainer.policy.ddp.buffers)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


OFFLOAD = [
    *of_each_draft("offload", "what changes with everything offloaded between steps", equal_with, offloads=True),
    *(
        Check(f"offload cycles {model}", f"memory that a worker keeps between steps on layers of {model}", run, 180.0)
        for model, run in ((model, partial(cycles, model=model)) for model in MODELS)
    ),
]
