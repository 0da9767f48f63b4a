"""Optimizer state of a trained module, for all of Megatron's optimizers."""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from skyrl_spec.models.parallel import Parallel


class TrainableState(Protocol):
    """Part of ``training.optimizer.Trainable`` that a checkpoint uses."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def optimizer(self) -> MegatronOptimizer: ...
    @property
    def scheduler(self) -> OptimizerParamScheduler: ...
    @property
    def parallel(self) -> Parallel: ...


def optimizers(trainable: TrainableState) -> list[MegatronOptimizer]:
    """Megatron's optimizers of the module, unchained."""
    optimizer = trainable.optimizer
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def initialize_optimizer(trainable: TrainableState) -> None:
    """Makes the zero state that an optimizer would make in its first step, if it has not stepped yet."""
    for optimizer in optimizers(trainable):
        inner = optimizer.optimizer
        optimizer.init_state_fn(inner, optimizer.config)
        if _counts_per_parameter(inner):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter].setdefault("step", torch.tensor(0.0))


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """Whether steps are counted per parameter (torch's Adam) or per group (Transformer Engine's, Apex's)."""
    return isinstance(inner, torch.optim.Adam)


def optimizer_steps(trainable: TrainableState) -> int:
    """Number of updates so far."""
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
    """Sets the counts of updates and of schedule steps, and the learning rate of that step."""
    for optimizer in optimizers(trainable):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            if _counts_per_parameter(inner):
                for parameter in group["params"]:
                    # One tensor per parameter, because torch increments it in place.
                    inner.state[parameter]["step"] = torch.tensor(float(optimizer_steps))
            else:
                group["step"] = optimizer_steps
    trainable.scheduler.num_steps = schedule_steps
    # Sets the learning rate.
    trainable.scheduler.step(increment=0)


def main_parameter(optimizer: MegatronOptimizer, parameter: Tensor) -> Tensor | None:
    """Tensor that the inner optimizer updates for ``parameter``.

    None if another data-parallel rank holds it, or another optimizer: experts have one of their own.
    """
    if isinstance(optimizer, DistributedOptimizer):
        if parameter not in optimizer.model_param_gbuf_map:
            return None
        group, index = optimizer.model_param_group_index_map[parameter]
        return optimizer.optimizer.param_groups[group]["params"][index]
    # Megatron sets main_param on 16-bit parameters only.
    main = parameter.main_param if hasattr(parameter, "main_param") else parameter
    return main if main in optimizer.optimizer.state else None
