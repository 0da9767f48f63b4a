"""What a check of the GPU pack is and what it measures, and helpers that several checks share.

A check runs in a process of its own (``run``), on CUDA in the sizes of real models, and on a CPU in small. It raises or
returns a ``Figure``.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Folder in a check's folder for files that are worth keeping.
KEEP = "keep"


@dataclass(frozen=True)
class Figure:
    """The number that a check comes down to, and others for the report."""

    value: float
    # None: a measurement that nothing is asked of.
    limit: float | None = None
    unit: str = ""
    # The value must not be below the limit, rather than not above it.
    at_least: bool = False
    # JSON values.
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        """False for NaN too."""
        if self.limit is None:
            return math.isfinite(self.value)
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Check:
    """``run(device, folder)`` with an empty folder for files; ``limit_s`` is for CUDA."""

    name: str
    # What the figure is, in a few words.
    what: str
    run: Callable[[torch.device, Path], Figure]
    limit_s: float = 120.0
    # What a CPU lacks for it. Empty: it runs there too.
    waits_for: str = ""


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """``|got - wanted| / |wanted|`` in float64."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def synchronize(device: torch.device) -> None:
    """Waits for everything that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device: torch.device, function: Callable[[], Any], repeats: int) -> float:
    """Median time of ``function`` after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a fork of this process, which must not have used CUDA. The result may hold CPU tensors.

    Devices, process groups and Megatron's state are set once in a process.

    Raises:
        RuntimeError: ``function`` raised, or its process died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        # torch would send handles of tensors, which end with their process.
        error, result = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
    except EOFError:
        error, result = "its process died", None
    process.join()
    if error:
        raise RuntimeError(f"{function.__name__}: {error}")
    return result


def _send_result(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    message: tuple[str, Any]
    try:
        message = "", function(*args)
    except Exception:
        message = traceback.format_exc(), None
    buffer = io.BytesIO()
    torch.save(message, buffer)
    sender.send_bytes(buffer.getbuffer())
