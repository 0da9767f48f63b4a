"""The Ray shell of a rollout engine."""

from __future__ import annotations

from typing import Any

import ray

from skyrl_spec.rollout.engine import EngineSettings, RolloutEngine, engine_environment
from skyrl_spec.sync.weights import Update, load_updates
from skyrl_spec.types import Versions


class EngineActor(RolloutEngine):
    """A ``RolloutEngine`` in a process of its own: the same methods, called remotely."""

    def ping(self) -> Versions:
        """Answers once the engine is built, with the weights it holds."""
        return self._versions

    def load_weights(self, updates: list[Update], versions: Versions) -> None:
        """A whole sync over Ray's object store."""
        load_updates(self, updates, versions)


RolloutActor = ray.remote(EngineActor)


def actor_options(settings: EngineSettings) -> dict[str, Any]:
    """Options of ``RolloutActor.options``: its resources, and the environment its process must start with.

    On CPU an engine asks for no Ray CPUs: engines and workers take turns on the same cores.
    """
    return {
        "num_cpus": 0,
        "num_gpus": settings.tensor_parallel_size if settings.device == "cuda" else 0,
        "runtime_env": {"env_vars": engine_environment(settings)},
    }
