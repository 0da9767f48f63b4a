"""Forward hooks that hand detached trunk tensors to a draft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class CapturePoint:
    """What to capture: the first input or the output of the submodule called ``module``."""

    module: str
    side: Literal["input", "output"]


class Captured:
    """What the last forward pass left, until it is taken.

    It listens only while it is told to: where activations are recomputed, hooks run again in the backward pass, and
    what they brought then would stay alive.
    """

    def __init__(self) -> None:
        self._tensors: dict[CapturePoint, Tensor] = {}
        self._is_listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around a forward pass."""
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False

    def put(self, point: CapturePoint, tensor: Tensor) -> None:
        if self._is_listening:
            self._tensors[point] = tensor.detach()

    def take(self) -> dict[CapturePoint, Tensor]:
        """The captured tensors ``[S, B, D]``, without gradient; afterwards nothing here keeps them alive."""
        tensors, self._tensors = self._tensors, {}
        return tensors


@contextmanager
def capture(model: nn.Module, points: tuple[CapturePoint, ...]) -> Iterator[Captured]:
    """Hooks on ``model`` for the time of the context, so that none is ever registered twice or left behind."""
    captured = Captured()
    handles = []
    for point in points:
        module = model.get_submodule(point.module)
        if point.side == "input":
            handles.append(module.register_forward_pre_hook(partial(_put_input, captured, point), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(_put_output, captured, point)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _put_input(
    captured: Captured, point: CapturePoint, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    captured.put(point, args[0] if args else kwargs["hidden_states"])


def _put_output(captured: Captured, point: CapturePoint, _module: nn.Module, _args: Any, output: Any) -> None:
    # Megatron's layers return (hidden_states, context).
    captured.put(point, output[0] if isinstance(output, tuple) else output)
