"""Requests that run in the engines while others come.

An engine samples in slices: ``RolloutEngine.advance`` takes new requests, steps for a while and returns what has
finished. Two such calls are always under way, so that an engine never waits for the driver. Other calls of an engine
(a sync, a canary) come between two slices.
"""

from __future__ import annotations

import time

import ray

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Generation, SampleRequest

# Seconds of a slice. A new request waits for two of them at most, a sync too.
_SLICE_S = 0.05
_CALLS_UNDER_WAY = 2


class RunningRequests:
    """The requests of all engines. For one thread, which must call ``poll`` often.

    What an engine has not answered when it is lost is asked again of its replacement. With ``is_one_batch`` all that
    it was ever asked is asked again, and what it had answered is given once. So every response is computed beside the
    same others, and has the same bits as without the loss.
    """

    def __init__(self, engines: EngineGroup, sampling: SamplingConfig, *, is_one_batch: bool = False):
        self._engines, self._sampling = engines, sampling
        num_engines = len(engines.handles)
        self._running: list[dict[int, SampleRequest]] = [{} for _ in range(num_engines)]
        # With is_one_batch, all requests, and the keys of those that are answered.
        self._batch: list[dict[int, SampleRequest]] | None = [{} for _ in range(num_engines)] if is_one_batch else None
        self._answered: set[int] = set()
        # Requests that the engine does not have yet.
        self._new: list[list[SampleRequest]] = [[] for _ in range(num_engines)]
        self._restarts = list(engines.restarts)
        self._calls: dict[ray.ObjectRef, int] = {}
        # When an engine last answered, or was asked without a call under way.
        self._heard = [0.0] * num_engines

    def __bool__(self) -> bool:
        """Whether any request runs."""
        return any(self._running)

    def least_loaded(self) -> int:
        """The engine with the fewest requests."""
        return min(range(len(self._running)), key=lambda place: len(self._running[place]))

    def add(self, place: int, request: SampleRequest) -> None:
        """Gives a request to an engine, with the next slice."""
        self._running[place][request.key] = request
        self._new[place].append(request)
        if self._batch is not None:
            self._batch[place][request.key] = request

    def poll(self, timeout_s: float) -> list[tuple[int, Generation]]:
        """Responses that have finished, by their requests' keys. Waits at most ``timeout_s`` for an engine's answer.

        Raises:
            LostActorError: an engine is lost and cannot be replaced.
        """
        self._ask()
        return self._receive(timeout_s)

    def drain(self) -> list[tuple[int, Generation]]:
        """Waits for the slices under way, and returns the responses that have finished. The engines are idle then."""
        finished = []
        while self._calls:
            finished += self._receive(_SLICE_S)
        return finished

    def _ask(self) -> None:
        for place, running in enumerate(self._running):
            if self._restarts[place] != self._engines.restarts[place]:
                self._start_again(place)
            under_way = sum(one == place for one in self._calls.values())
            if not under_way:
                self._heard[place] = time.monotonic()
            if running:
                for _ in range(_CALLS_UNDER_WAY - under_way):
                    new, self._new[place] = self._new[place], []
                    self._calls[self._engines.advance(place, new, self._sampling, _SLICE_S)] = place

    def _receive(self, timeout_s: float) -> list[tuple[int, Generation]]:
        finished: list[tuple[int, Generation]] = []
        if not self._calls:
            return finished
        ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        ready = ready or ray.wait(list(self._calls), timeout=timeout_s)[0]
        for ref in ready:
            # It may be gone with its engine.
            if (place := self._calls.get(ref)) is None:
                continue
            answer = self._engines.answer_or_replace(ref, place)
            if answer is None:
                self._start_again(place)
                continue
            del self._calls[ref]
            self._heard[place] = time.monotonic()
            for key, generation in answer:
                del self._running[place][key]
                if key not in self._answered:
                    finished.append((key, generation))
        if self._batch is not None:
            self._answered.update(key for key, _ in finished)
        self._engines.look_around()
        self._replace_silent()
        return finished

    def _replace_silent(self) -> None:
        """Replaces engines that have not answered for too long."""
        for place in set(self._calls.values()):
            if time.monotonic() - self._heard[place] <= self._engines.timeout_s:
                continue
            calls = [ref for ref, one in self._calls.items() if one == place]
            # It may have answered while another engine was replaced.
            if not ray.wait(calls, timeout=0)[0]:
                self._engines.replace_silent(place)
                self._start_again(place)

    def _start_again(self, place: int) -> None:
        """Asks a replacement again."""
        self._calls = {ref: one for ref, one in self._calls.items() if one != place}
        if self._batch is not None:
            self._running[place] = dict(self._batch[place])
        self._new[place] = list(self._running[place].values())
        self._restarts[place] = self._engines.restarts[place]
