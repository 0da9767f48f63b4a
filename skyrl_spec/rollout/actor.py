"""A rollout engine as a Ray actor."""

from __future__ import annotations

import signal
from typing import Any

import ray

from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings, engine_environment
from skyrl_spec.sync.weights import Update, load_updates
from skyrl_spec.types import Versions


class EngineActor(RolloutEngine):
    """A ``RolloutEngine`` whose methods are called remotely, in a separate process."""

    def __init__(self, settings: EngineSettings):
        # The driver decides when an engine ends. A scheduler may signal every process of a job.
        signal.signal(signal.SIGTERM, lambda *_: None)
        super().__init__(settings)

    def ping(self) -> Versions:
        """Versions of the weights that the engine holds. The call returns once the engine is built."""
        return self._versions

    def load_weights(self, updates: list[Update], versions: Versions, keeps_keys: bool = False) -> None:
        """Receives a whole sync over Ray's object store."""
        load_updates(self, updates, versions, keeps_keys=keeps_keys)


RolloutActor = ray.remote(EngineActor)


def actor_options(settings: EngineSettings) -> dict[str, Any]:
    """Arguments for ``RolloutActor.options``: resources and environment variables of the process.

    On CPU an engine reserves no CPUs in Ray, because engines and workers take turns on the same cores.
    """
    return {
        "num_cpus": 0,
        "num_gpus": settings.tensor_parallel_size if settings.device == "cuda" else 0,
        "runtime_env": {"env_vars": engine_environment(settings)},
    }
