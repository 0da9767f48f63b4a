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
from typing import Generic, TypeVar

T = TypeVar("T")

# Longest time for a batch to be given up, once its engines are gone.
_END_S = 10.0
# Seconds between looks whether the run is told to stop.
_LOOK_INTERVAL_S = 0.2


class Ahead(Generic[T]):
    """The next batch, which another thread samples. One at a time."""

    def __init__(self, sample: Callable[[], T]):
        self._sample = sample
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._batch: Future[T] | None = None
        # Seconds that the last batch took.
        self.seconds = 0.0

    @property
    def has_batch(self) -> bool:
        """Whether a batch was begun that nobody has taken."""
        return self._batch is not None

    @property
    def is_running(self) -> bool:
        """Whether the batch is still being sampled."""
        return self._batch is not None and not self._batch.done()

    @contextmanager
    def beside(self, is_stopping: Callable[[], bool]) -> Iterator[None]:
        """Context during which a batch is sampled. It ends when the batch is there, or with the error of its body.

        A run that is told to stop does not wait for the batch.
        """
        assert self._batch is None
        self._batch = self._executor.submit(self._timed)
        yield
        while self.is_running and not is_stopping():
            wait([self._batch], timeout=_LOOK_INTERVAL_S)

    def take(self) -> T:
        """The batch that was sampled. Raises what its sampling raised."""
        assert self._batch is not None
        batch, self._batch = self._batch, None
        return batch.result()

    def _timed(self) -> T:
        start = time.perf_counter()
        batch = self._sample()
        self.seconds = time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Gives up a batch that nobody took. Its engines must be gone, or it would be sampled to its end."""
        if self._batch is not None:
            wait([self._batch], timeout=_END_S)
        self._executor.shutdown(wait=False)
