"""Forward hooks that hand detached trunk tensors to a draft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from skyrl_spec.models.pack import Pack
from skyrl_spec.models.policy import PolicyModel
from skyrl_spec.models.sequence_parallel import whole


@dataclass(frozen=True)
class CapturePoint:
    """First input or output of the submodule that is named ``module`` in the whole model."""

    module: str
    side: Literal["input", "output"]


# The embedding's output, which a stage that has none makes of its copy.
EMBEDDING = CapturePoint("embedding", "output")


def layer_output(layer: int) -> CapturePoint:
    """Output of a layer, from 0."""
    return CapturePoint(f"decoder.layers.{layer}", "output")


class Captured:
    """Activations captured by the last forward pass, until ``take`` hands them over.

    Hooks also run in the backward pass when activations are recomputed. Tensors of these runs would stay alive, so only
    those inside ``listening`` are kept.
    """

    def __init__(self, *, is_sequence_parallel: bool) -> None:
        self._tensors: dict[CapturePoint, Tensor] = {}
        self._is_listening, self._is_sequence_parallel = False, is_sequence_parallel
        # This rank's tokens of the last pack.
        self.num_tokens = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context of a forward pass whose activations are captured."""
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False

    def put(self, point: CapturePoint, tensor: Tensor) -> None:
        """Keeps ``tensor`` without its gradient, if listening."""
        if self._is_listening:
            self._tensors[point] = tensor.detach()

    def take(self) -> dict[CapturePoint, Tensor]:
        """Captured tensors ``[T, D]``, without gradient. This object no longer holds them.

        Under sequence parallelism this is collective over tensor-parallel ranks.
        """
        tensors = self.take_parts()
        if self._is_sequence_parallel:
            return {point: whole(tensor, self.num_tokens) for point, tensor in tensors.items()}
        return {point: tensor[:, 0] for point, tensor in tensors.items()}

    def take_parts(self) -> dict[CapturePoint, Tensor]:
        """``take`` without what other tensor-parallel ranks have: the model's own tensors, ``[T, 1, D]``."""
        tensors, self._tensors = self._tensors, {}
        return tensors

    def add_parts(self, tensors: dict[CapturePoint, Tensor]) -> None:
        """Adds tensors of other pipeline stages to the last forward pass."""
        self._tensors |= tensors


@contextmanager
def capture(model: PolicyModel, points: tuple[CapturePoint, ...]) -> Iterator[Captured]:
    """Hooks on ``model`` at those of ``points`` that its stage has, removed at the end of the context."""
    captured = Captured(is_sequence_parallel=model.config.sequence_parallel)
    handles = [model.register_forward_pre_hook(partial(_put_length, captured))]
    modules = {model.whole_name(name): module for name, module in model.named_modules()}
    for point in points:
        module = modules.get(point.module)
        if module is None:
            continue
        if point.side == "input":
            handles.append(module.register_forward_pre_hook(partial(_put_input, captured, point), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(_put_output, captured, point)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _put_length(captured: Captured, _model: nn.Module, args: tuple[Pack]) -> None:
    captured.num_tokens = args[0].num_own


def _put_input(
    captured: Captured, point: CapturePoint, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    captured.put(point, args[0] if args else kwargs["hidden_states"])


def _put_output(captured: Captured, point: CapturePoint, _module: nn.Module, _args: Any, output: Any) -> None:
    # Megatron's layers return (hidden_states, context).
    captured.put(point, output[0] if isinstance(output, tuple) else output)
