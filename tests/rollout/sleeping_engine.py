"""A CPU engine that loses in its sleep what an engine on a GPU loses. It stands in for vLLM's allocator on GPUs.

vLLM's CPU worker ignores sleep. Here weights become 0, and keys become NaN until they wake. Weights come back at level
1, and at level 2 those that ``sleep_preserve_parameter_names`` names. The scheduler, the order of calls and the
transfer are vLLM's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import torch

from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.types import Component


def sleep_as_on_a_gpu() -> None:
    """Makes CPU workers of this process lose what they hold."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    CPUWorker.sleep, CPUWorker.wake_up = _sleep, _wake_up


def _parameters(worker: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by vLLM's names for ``sleep_preserve_parameter_names``. What policy and draft share comes once."""
    yield from worker.model_runner.model.named_parameters()
    shared = {id(parameter) for parameter in worker.model_runner.model.parameters()}
    draft = worker.get_draft_model()
    if draft is not None:
        for name, parameter in draft.named_parameters():
            if id(parameter) not in shared:
                yield f"draft.{name}", parameter


@torch.no_grad()
def _sleep(worker: Any, level: int = 1) -> None:
    kept = ["*"] if level == 1 else worker.model_config.sleep_preserve_parameter_names
    worker.slept = {}
    for name, parameter in _parameters(worker):
        if any(fnmatch(name, pattern) for pattern in kept):
            worker.slept[name] = parameter.clone()
        parameter.zero_()
    for keys in worker.model_runner.kv_caches:
        keys.fill_(math.nan)


@torch.no_grad()
def _wake_up(worker: Any, tags: list[str] | None = None) -> None:
    if tags is None or "weights" in tags:
        for name, parameter in _parameters(worker):
            if name in worker.slept:
                parameter.copy_(worker.slept[name])
    if tags is None or "kv_cache" in tags:
        for keys in worker.model_runner.kv_caches:
            keys.zero_()


class SleepingEngine(RolloutEngine):
    def __init__(self, settings: EngineSettings):
        sleep_as_on_a_gpu()
        super().__init__(settings)

    def forget_that_it_lacks(self, component: Component) -> None:
        """Takes the check away that no weights are missing, to see what happens without it."""
        self._sleep.arrived(component)
