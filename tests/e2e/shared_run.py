"""``skyrl-spec`` on CPU with engines and workers that take turns, as with ``trainer.placement.colocate_all`` on GPUs.

``LEVEL`` (an environment variable) is the level at which engines sleep. The engines lose what they would on a GPU
(tests/rollout/sleeping_engine.py). ``MISTAKE`` names something that is done wrong.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

import ray
from sleeping_engine import sleep_as_on_a_gpu

from skyrl_spec.cli import main
from skyrl_spec.controller import placement, shifts
from skyrl_spec.rollout.actor import EngineActor
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.sync.weights import WeightSync

LEVEL, MISTAKE = "SKYRL_SPEC_TEST_LEVEL", "SKYRL_SPEC_TEST_MISTAKE"


class SleepingActor(EngineActor):
    def __init__(self, settings: EngineSettings):
        sleep_as_on_a_gpu()
        super().__init__(settings)

    def wake_keys(self) -> None:
        if os.environ.get(MISTAKE) == "no check":
            self._sleep.arrived("draft")
        super().wake_keys()


def make(mistake: str) -> None:
    """Does something wrong in this process."""
    if mistake in ("no draft", "no check"):
        WeightSync.weights_are_gone = lambda self: None  # type: ignore[method-assign]
    wake = shifts.Shifts._wake
    if mistake == "keys first":
        order = {"weights": "keys", "keys": "weights"}
        shifts.Shifts._wake = lambda self, what: wake(self, order[what])  # type: ignore[method-assign]
    if mistake == "asleep":
        # In the first step.
        sync = shifts.Shifts.sync
        shifts.Shifts.sync = lambda self: nullcontext() if self._has_begun else sync(self)  # type: ignore[method-assign]


if __name__ == "__main__":
    level = int(os.environ[LEVEL])
    placement.RolloutActor = ray.remote(SleepingActor)
    placement.sleep_level = lambda config: level
    shifts.deepest_sleep = lambda config, trains_policy=True: level
    start_actors: Any = placement.start_actors

    def started(config: Any, settings: Any, *args: Any, **kwargs: Any) -> Any:
        engines, policy = start_actors(config, settings, *args, **kwargs)
        # On GPUs they sleep since before the workers started.
        engines.all("sleep", 1)
        return engines, policy

    placement.start_actors = started
    make(os.environ.get(MISTAKE, ""))
    sys.exit(main(sys.argv[1:]))
