"""Requests of one vLLM engine. Each finishes by itself, while others go on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any


class Requests:
    """Adds requests to vLLM, steps it, and keeps what has finished until it is taken."""

    def __init__(self, engine: Any):
        """``engine``: vLLM's ``LLMEngine``."""
        self._engine = engine
        self._names = (f"request-{number}" for number in itertools.count())
        self._running: set[str] = set()
        self._aside: set[str] = set()
        self._finished: dict[str, Any] = {}

    def add(self, prompt: Any, params: Any) -> str:
        """Adds a request and returns its name. Its output comes once, when all of its responses have ended."""
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        name = next(self._names)
        self._engine.add_request(name, prompt, params)
        self._running.add(name)
        return name

    def run(self, names: Sequence[str]) -> list[Any]:
        """Steps until these requests have finished, and returns their outputs. Others go on beside them."""
        while not self._running.isdisjoint(names):
            self._step()
        return [self._finished.pop(name) for name in names]

    def run_for(self, seconds: float) -> None:
        """Steps for this long, or until nothing runs."""
        end = time.perf_counter() + seconds
        while self._running and time.perf_counter() < end:
            self._step()

    def take(self, names: Sequence[str]) -> dict[str, Any]:
        """Outputs of those of these requests that have finished. Each is given once."""
        return {name: self._finished.pop(name) for name in names if name in self._finished}

    def set_aside(self) -> None:
        """Notes that what runs now is stopped."""
        assert not self._aside
        self._running, self._aside = set(), self._running

    def take_back(self) -> None:
        """Notes that what was stopped runs again."""
        self._running, self._aside = self._running | self._aside, set()

    def _step(self) -> None:
        for output in self._engine.step():
            # A core in its own process may have finished it before it was told to stop.
            self._running.discard(output.request_id)
            self._aside.discard(output.request_id)
            self._finished[output.request_id] = output
