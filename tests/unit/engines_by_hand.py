"""Engines that are told when a response ends, in place of vLLM."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import ray

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Generation, SampleRequest, Versions


@ray.remote(num_cpus=0)
class EngineByHand:
    """A response is its prompt's tokens and its seed. It ends with the first slice, unless a file is awaited.

    ``awaited``: the responses to prompts that begin with so many wait for a file. ``dies``: in the second slice.
    """

    def __init__(self, awaited: dict[int, Path], *, dies: bool = False):
        self._awaited, self._dies = awaited, dies
        self._running: dict[int, SampleRequest] = {}
        self._asked: list[int] = []
        self._num_slices = 0

    def advance(self, requests: list[SampleRequest], sampling: SamplingConfig, seconds: float) -> list[Any]:
        self._num_slices += 1
        if self._dies and self._num_slices == 2:
            # What it answered before is on its way.
            time.sleep(1.0)
            os._exit(1)
        self._asked += [request.key for request in requests]
        self._running |= {request.key: request for request in requests}
        ended = [request for request in self._running.values() if self._may_end(request)]
        for request in ended:
            del self._running[request.key]
        return [(request.key, self._generation(request)) for request in ended]

    def asked(self) -> list[int]:
        return self._asked

    def _may_end(self, request: SampleRequest) -> bool:
        path = self._awaited.get(request.token_ids[0])
        return path is None or path.exists()

    def _generation(self, request: SampleRequest) -> Generation:
        token_ids = [*request.token_ids, request.seed]
        return Generation(token_ids, [0.0] * len(token_ids), "stop", Versions())
