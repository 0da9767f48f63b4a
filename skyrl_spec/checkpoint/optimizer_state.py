"""Optimizer state of what is trained, whichever of Megatron's optimizers holds it."""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from skyrl_spec.models.parallel import Parallel


class TrainableState(Protocol):
    """What a checkpoint saves of a trained module (``training.optimizer.Trainable``)."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def optimizer(self) -> MegatronOptimizer: ...
    @property
    def scheduler(self) -> OptimizerParamScheduler: ...
    @property
    def parallel(self) -> Parallel: ...


def optimizers(trainable: TrainableState) -> list[MegatronOptimizer]:
    optimizer = trainable.optimizer
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def initialize_optimizer(trainable: TrainableState) -> None:
    """Give an optimizer that has not stepped yet the state it would make in its first step: zeros."""
    for optimizer in optimizers(trainable):
        inner = optimizer.optimizer
        optimizer.init_state_fn(inner, optimizer.config)
        if _counts_per_parameter(inner):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter].setdefault("step", torch.tensor(0.0))


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts in each parameter's state, Transformer Engine's and Apex's in the parameter group."""
    return isinstance(inner, torch.optim.Adam)


def optimizer_steps(trainable: TrainableState) -> int:
    """Updates so far."""
    counts = set()
    for optimizer in optimizers(trainable):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            if _counts_per_parameter(inner):
                counts |= {int(inner.state[parameter]["step"]) for parameter in group["params"]}
            elif group["params"]:
                counts.add(int(group.get("step", 0)))
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def set_steps(trainable: TrainableState, optimizer_steps: int, schedule_steps: int) -> None:
    for optimizer in optimizers(trainable):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            if _counts_per_parameter(inner):
                for parameter in group["params"]:
                    # A tensor each: torch counts them up in place.
                    inner.state[parameter]["step"] = torch.tensor(float(optimizer_steps))
            else:
                group["step"] = optimizer_steps
    trainable.scheduler.num_steps = schedule_steps
    # Sets the learning rate that goes with the count.
    trainable.scheduler.step(increment=0)


def main_parameter(optimizer: MegatronOptimizer, parameter: Tensor) -> Tensor | None:
    """What the inner optimizer updates in place of ``parameter``; None if that is on another data-parallel rank."""
    if isinstance(optimizer, DistributedOptimizer):
        if parameter not in optimizer.model_param_gbuf_map:
            return None
        group, index = optimizer.model_param_group_index_map[parameter]
        return optimizer.optimizer.param_groups[group]["params"][index]
    # Set on 16-bit parameters alone.
    return parameter.main_param if hasattr(parameter, "main_param") else parameter
