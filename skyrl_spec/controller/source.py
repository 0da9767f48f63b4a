"""Where a run's batches come from. There are three sources, by ``trainer.fully_async.max_staleness_steps``:

- 0, ``in_turns.InTurns``: engines sample a batch, then workers train on it.
- 1, ``ahead.OneStepAhead``: engines sample the next batch while workers train on this one.
- 2 and more, ``continuous.Continuous``: groups run in the engines at all times.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from skyrl_spec.algorithms.filters import Collected, Group
from skyrl_spec.metrics import names
from skyrl_spec.settings.schema import Config
from skyrl_spec.types import Rollout, Versions


@dataclass(frozen=True)
class Sampled:
    """A step's groups of rollouts, with metrics and timings of their sampling."""

    groups: list[Group]
    values: dict[str, float]
    timings: dict[str, float]
    # Seconds of the step that sampling and scoring took.
    seconds: float

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group]


class Source(Protocol):
    """The batches of a run, in order. All methods are for the thread that trains.

    ``start`` comes once. Then each step calls ``take``, ``beside``, ``held``, ``trained`` and ``step_metrics``.
    """

    @property
    def is_over(self) -> bool:
        """Whether no batch is left."""

    def start(self, versions: Versions, num_steps: int) -> None:
        """Begins the first of so many steps, with engines that have these weights."""

    def take(self, versions: Versions) -> Sampled:
        """The batch to train on at these versions. Waits for it."""

    def beside(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Context of the training on the batch that was taken."""

    @property
    def is_sampling(self) -> bool:
        """Whether engines still sample the next batch after ``beside``: a run that stops does not wait for it."""

    def held(self, *, keeps_keys: bool = False) -> AbstractContextManager[None]:
        """Context of a sync or an evaluation: the engines are idle.

        ``keeps_keys``: requests that wait for its end keep their keys, and nothing else can run meanwhile.
        """

    def draft_metrics(self) -> dict[str, float]:
        """Metrics of drafts since the last ``held``, where they do not come with a batch. Call it within ``held``."""

    def trained(self, versions: Versions) -> None:
        """Notes the end of a step: engines have these weights."""

    def step_metrics(self, sampled: Sampled, timings: dict[str, float]) -> dict[str, float]:
        """Metrics of a whole step: what ran beside what, and for how long."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``, the stream of prompts excepted: whoever made that has restored it."""

    def close(self) -> None:
        """Ends threads, and the processes that score."""


class FilterReport:
    """Metrics of dynamic sampling."""

    def __init__(self, config: Config):
        self._size, self._dynamic_sampling = config.trainer.train_batch_size, config.trainer.algorithm.dynamic_sampling
        self._said_short_batch = False

    def metrics(self, collected: Collected) -> dict[str, float]:
        """Counts, or nothing without a filter. Prints a line, once, if groups did not fill the batch."""
        if self._dynamic_sampling.type is None:
            return {}
        if len(collected.groups) < self._size and not self._said_short_batch:
            self._said_short_batch = True
            print(
                f"skyrl-spec: trainer.algorithm.dynamic_sampling.max_sample_batches={collected.num_batches}: gave "
                f"{len(collected.groups)} of {self._size} groups whose rewards differ; the step goes on "
                "with them (said once)",
                file=sys.stderr,
            )
        return {names.NUM_SAMPLE_BATCHES: collected.num_batches, names.NUM_KEPT_GROUPS: collected.num_kept}
