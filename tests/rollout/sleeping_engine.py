"""A CPU engine that loses in its sleep what an engine on a GPU loses. It stands in for vLLM's allocator on GPUs.

vLLM's CPU worker ignores sleep. Here weights become 0, and so does what modules keep beside parameters and buffers (a
DFlash draft has such tensors). All come back at level 1. Keys become NaN, and noise when they wake. The scheduler, the
order of calls and the transfer are vLLM's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.types import Component


def sleep_as_on_a_gpu() -> None:
    """Makes CPU workers of this process lose what they hold."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    CPUWorker.sleep, CPUWorker.wake_up = _sleep, _wake_up


def _lost(worker: Any) -> list[torch.Tensor]:
    """What vLLM's allocator frees: tensors of policy and draft, but not buffers, which vLLM saves itself."""
    models = [model for model in (worker.model_runner.model, worker.get_draft_model()) if model is not None]
    modules = [module for model in models for module in model.modules()]
    held = [value for module in modules for value in (*module._parameters.values(), *vars(module).values())]
    saved = {buffer.data_ptr() for model in models for buffer in model.buffers()}
    # By address: policy and draft share some.
    return list(
        {
            tensor.data_ptr(): tensor
            for tensor in held
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in saved
        }.values()
    )


@torch.no_grad()
def _sleep(worker: Any, level: int = 1) -> None:
    worker.slept = [(tensor, tensor.clone()) for tensor in _lost(worker)] if level == 1 else []
    for tensor in _lost(worker):
        tensor.zero_()
    for keys in worker.model_runner.kv_caches:
        keys.fill_(math.nan)


@torch.no_grad()
def _wake_up(worker: Any, tags: list[str] | None = None) -> None:
    if tags is None or "weights" in tags:
        for tensor, kept in worker.slept:
            tensor.copy_(kept)
    if tags is None or "kv_cache" in tags:
        for keys in worker.model_runner.kv_caches:
            keys.uniform_(-10, 10)


class SleepingEngine(RolloutEngine):
    def __init__(self, settings: EngineSettings):
        sleep_as_on_a_gpu()
        super().__init__(settings)

    def forget_that_it_lacks(self, component: Component) -> None:
        """Takes the check away that no weights are missing, to see what happens without it."""
        self._sleep.arrived(component)
