"""What the draft reads of the policy's forward pass, from all pipeline stages.

The draft is on the last stage. Outputs of layers of earlier stages go there beside the pipeline, straight from their
stage, in the order of micro-batches. The embedding is computed again, from the last stage's copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_spec.models import megatron_patches
from skyrl_spec.models.capture import EMBEDDING, Captured, CapturePoint, capture, layer_output
from skyrl_spec.models.pack import Pack
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.policy import PolicyModel
from skyrl_spec.specs.stages import Stages
from skyrl_spec.training.pipeline import state_shape


class DraftStates:
    """Captured states of one micro-batch after the other.

    Args:
        layers: numbers of the layers whose outputs the draft reads, equal on all stages. None: there is no draft.
        points: what the draft reads, on the last stage.
        require: brings the weights of a model back, should they be in host memory.
    """

    def __init__(
        self,
        model: PolicyModel,
        parallel: Parallel,
        stages: Stages,
        layers: Sequence[int] | None,
        points: Sequence[CapturePoint],
        require: Callable[[torch.nn.Module], None],
    ):
        self._require = require
        self._model, self._parallel, self._has_draft, self._points = model, parallel, layers is not None, tuple(points)
        last = parallel.pp_size - 1
        # Both sides go through them in this order.
        by_stage = [(stages.of_layer(layer), layer_output(layer)) for layer in layers or ()]
        self._sent = [(stage, point) for stage, point in by_stage if stage < last]
        if not parallel.is_last_stage:
            self._points = tuple(point for stage, point in self._sent if stage == parallel.pp_rank)
        self._under_way: list[tuple[Any, Tensor]] = []
        self._captured: Captured | None = None

    @contextmanager
    def read(self, *, is_read: bool = True) -> Iterator[None]:
        """Context of forward passes whose states the draft reads. ``is_read=False``: it reads nothing."""
        if not self._has_draft or not is_read:
            yield
            return
        self._require(self._model)
        # The policy may have other weights than before.
        self._model.refresh_embedding(self._parallel)
        with capture(self._model, self._points) as self._captured:
            yield
        self._captured = None
        for work, _ in self._under_way:
            work.wait()
        self._under_way = []

    def forward(self, model: torch.nn.Module, pack: Pack, *, is_read: bool = True) -> Tensor:
        """This stage's part of a forward pass. What the draft reads goes to the last stage, where ``take`` finds it."""
        self._require(model)
        captured = self._captured if is_read else None
        with megatron_patches.megatron_device(self._parallel.device):
            if captured is None:
                return model(pack)
            with captured.listening():
                hidden = model(pack)
        if self._parallel.is_last_stage:
            self._receive(captured, pack)
        else:
            self._send(captured)
        return hidden

    def take(self, pack: Pack) -> dict[CapturePoint, Tensor]:
        """States of this rank's tokens of the last micro-batch, ``[T, D]``. Collective over tensor-parallel ranks."""
        assert self._captured is not None
        states = self._captured.take()
        if EMBEDDING in self._points and EMBEDDING not in states:
            states[EMBEDDING] = self._model.embed(pack.own(pack.token_ids_T))
        return states

    def _send(self, captured: Captured) -> None:
        """Returns before anything has arrived."""
        states, last = captured.take_parts(), self._parallel.rank_of_stage(self._parallel.pp_size - 1)
        for point in self._points:
            state_T1D = states[point].contiguous()
            self._under_way.append((dist.isend(state_T1D, last, group=self._parallel.side_group), state_T1D))
        self._under_way = [(work, state) for work, state in self._under_way if not work.is_completed()]

    def _receive(self, captured: Captured, pack: Pack) -> None:
        config, states = self._model.config, dict[CapturePoint, Tensor]()
        for stage, point in self._sent:
            shape = state_shape(pack, config)
            states[point] = torch.empty(shape, dtype=config.params_dtype, device=self._parallel.device)
            dist.recv(states[point], self._parallel.rank_of_stage(stage), group=self._parallel.side_group)
        captured.add_parts(states)
