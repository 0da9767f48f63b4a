"""Measures an engine's step times before the first rollout, on prompts and with the sampling of the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from skyrl_spec.rollout.step_times import sizes_to_measure


def measure_steps(
    llm: Any, call_speculation: Callable[..., Any], prompts: Sequence[Any], sampling: Any, largest: int
) -> tuple[list[int], list[list[float]]]:
    """Batch sizes up to ``largest``, and the seconds of a step at each, for each of ``lengths_to_measure``.

    ``prompts`` and ``sampling``: vLLM's inputs of requests. The engine must be idle, and is idle afterwards.
    """
    names = (f"calibration-{number}" for number in itertools.count())
    endless = itertools.cycle(prompts)
    table: dict[int, list[float]] = {}
    for size in sizes_to_measure(largest):
        seconds = _measure(llm.llm_engine, call_speculation, endless, sampling, size, names)
        if not seconds:
            break
        table[size] = seconds
    return list(table), list(table.values())


def _measure(
    engine: Any, call_speculation: Callable[..., Any], prompts: Any, sampling: Any, size: int, names: Any
) -> list[float]:
    call_speculation("start_calibration", size)
    running: list[str] = []
    while (seconds := call_speculation("calibrated_seconds")) is None:
        if not engine.has_unfinished_requests():
            # All ended together, at their longest. The calibration goes on with new ones.
            running = [engine.add_request(next(names), next(prompts), sampling) for _ in range(size)]
        engine.step()
    engine.abort_request(running, internal=True)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds
