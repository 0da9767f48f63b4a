"""Sampling of the next batch beside training (``trainer.fully_async``).

    step t:    train on batch t           | engines sample batch t+1
               both are done -> sync, canaries, evaluation
    step t+1:  train on batch t+1, sampled with the weights before step t  | engines sample batch t+2

No request runs during a sync, so every response comes from one version of policy and draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.in_turns import InTurns
from skyrl_spec.controller.measures import idle_shares
from skyrl_spec.controller.rollouts import RolloutSampler
from skyrl_spec.controller.source import Sampled
from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.settings.schema import Config
from skyrl_spec.types import Versions

# Longest time for a batch to be given up, once its engines are gone.
_END_S = 10.0
# Seconds between looks whether the run is told to stop.
_LOOK_INTERVAL_S = 0.2


class OneStepAhead(InTurns):
    """Samples a batch ahead, in another thread, one at a time. The first one is sampled when it is asked for."""

    def __init__(
        self,
        config: Config,
        sampler: RolloutSampler,
        engines: EngineGroup,
        stream: PromptStream,
        is_stopping: Callable[[], bool],
    ):
        """``is_stopping``: whether the run is told to stop."""
        super().__init__(config, sampler, engines, stream)
        self._is_stopping = is_stopping
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._batch: Future[Sampled] | None = None
        # What a checkpoint needs to sample again the batch that was begun for the next step.
        self._before: dict[str, Any] | None = None
        # Seconds of the batch that was sampled beside the last training; None: there was none.
        self._beside_s: float | None = None

    @property
    def is_over(self) -> bool:
        return self._batch is None and super().is_over

    @property
    def is_sampling(self) -> bool:
        return self._batch is not None and not self._batch.done()

    def take(self, versions: Versions) -> Sampled:
        if self._batch is None:
            return self.sample()
        batch, self._batch, self._before = self._batch, None, None
        # These seconds were part of the step before.
        return replace(batch.result(), seconds=0.0)

    @contextmanager
    def beside(self, *, is_last: bool) -> Iterator[None]:
        """Samples the next batch meanwhile. It ends when the batch is there, or with the error of its body.

        A run that is told to stop does not wait for the batch.
        """
        self._beside_s = None
        if is_last:
            yield
            return
        assert self._batch is None
        self._before = super().state_dict()
        self._batch = self._executor.submit(self._timed)
        yield
        while self.is_sampling and not self._is_stopping():
            wait([self._batch], timeout=_LOOK_INTERVAL_S)

    def step_metrics(self, sampled: Sampled, timings: dict[str, float]) -> dict[str, float]:
        return {} if self._beside_s is None else idle_shares(timings, self._beside_s)

    def state_dict(self) -> dict[str, Any]:
        return self._before or super().state_dict()

    def close(self) -> None:
        """Gives up a batch that nobody took. Its engines end, or it would be sampled to its end."""
        if self._batch is not None:
            self._engines.shutdown()
        super().close()
        if self._batch is not None:
            wait([self._batch], timeout=_END_S)
        self._executor.shutdown(wait=False)

    def _timed(self) -> Sampled:
        start = time.perf_counter()
        batch = self.sample()
        self._beside_s = time.perf_counter() - start
        return batch
