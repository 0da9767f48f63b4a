"""A clock for work on a device."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """Total seconds inside its context. On a GPU, CUDA events measure them without a synchronization."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Starts again from 0."""
        self._intervals: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        self._intervals.append((self._start, self._now()))

    def seconds(self) -> float:
        """Seconds since ``reset``. Synchronizes the GPU."""
        if not self._cuda:
            return sum(end - start for start, end in self._intervals)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._intervals) / 1000.0

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
