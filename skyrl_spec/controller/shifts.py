"""Whose turn it is on GPUs that engines and workers share (``trainer.placement.colocate_all``).

    phase      engines have        workers have
    sampling   weights, keys       what the settings do not offload
    workers    nothing: asleep     weights, gradients, optimizer state
    sync       weights             weights
    scoring    nothing: asleep     weights                                 canaries, and exports of the model

On devices of their own the engines stay awake, and workers offload what the settings say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.drafts.kinds.offloads import deepest_sleep, offloads
from skyrl_spec.settings.schema import Config
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.types import Proposals, ProposalScores


class Shifts:
    """Contexts of the phases in which workers need their devices. Outside of them the engines sample."""

    def __init__(self, config: Config, engines: EngineGroup, policy: PolicyGroup, sync: WeightSync):
        self._engines, self._policy, self._sync = engines, policy, sync
        self._level = deepest_sleep(config, trains_policy="policy" in sync.components)
        moved = offloads(config)
        self._moves_state = moved.policy_state or moved.draft_state
        self._moves_weights = moved.weights
        # Engines of shared GPUs sleep since they were started. Elsewhere they are awake and wait for ``begin``.
        self._has_begun, self._are_asleep = False, self._level > 0
        # Seconds of moves since the last ``take_seconds``.
        self._seconds = 0.0

    def begin(self) -> None:
        """The first phase of sampling, unless a ``sync`` has begun it."""
        if not self._has_begun:
            with self.workers():
                pass
            with self.sync():
                pass

    @contextmanager
    def workers(self) -> Iterator[None]:
        """Context of training. Unless it fails, a ``sync`` must follow: the engines may have lost their weights."""
        self._sleep(self._level)
        yield
        # Where engines wait for memory, the workers give back also what PyTorch has kept.
        if self._moves_state or self._level:
            with self._timed():
                self._policy.offload_training_state()

    @contextmanager
    def sync(self) -> Iterator[None]:
        """Context of a sync."""
        self._sleep(1)
        self._wake("weights")
        yield
        self._offload_weights()
        self._wake("keys")
        self._has_begun, self._are_asleep = True, False

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Context in which workers compute on what engines have sampled, or export weights."""
        self._sleep(1)
        yield
        self._offload_weights()
        self._wake("weights")
        self._wake("keys")
        self._are_asleep = False

    @property
    def move(self) -> bool:
        """Whether anything is moved."""
        return self._moves_state or self._moves_weights or self._level > 0

    def take_seconds(self) -> float:
        """Seconds of all moves since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _sleep(self, level: int) -> None:
        """Lets engines that are awake sleep."""
        if self._level == 0 or self._are_asleep:
            return
        with self._timed():
            self._engines.all("sleep", level)
        self._are_asleep = True
        if level == 2:
            self._sync.weights_are_gone()

    def _wake(self, what: str) -> None:
        if self._level:
            with self._timed():
                self._engines.all(f"wake_{what}")

    def _offload_weights(self) -> None:
        if self._moves_weights or self._level:
            with self._timed():
                self._policy.offload_weights()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


class ScoringWorkers:
    """Workers that score responses while the engines sleep."""

    def __init__(self, policy: PolicyGroup, shifts: Shifts):
        self._policy, self._shifts = policy, shifts

    def score_all(self, answers: Sequence[list[Proposals]]) -> list[ProposalScores]:
        """Scores of several engines' answers, in one sleep."""
        with self._shifts.scoring():
            return [self._policy.score_proposals(answer) for answer in answers]
