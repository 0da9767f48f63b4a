"""Experts that tokens are sent to because an engine sent them there (``algorithm.router_replay``).

Shapes: T tokens of this rank, L layers of the whole model, E experts, k of a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RouterReplay:
    """Replaces the choices of a model's routers. The weights of the chosen experts are the router's own."""

    def __init__(self, routers: list[Any], first_layer: int):
        self._first_layer = first_layer
        self._layers = [_Layer() for _ in routers]
        for router, layer in zip(routers, self._layers, strict=True):
            # Megatron's router asks it for the highest scores.
            router.router_replay = layer

    def set(self, experts_TLk: Tensor | None, *, is_computed_again: bool) -> None:
        """Sets the choices of the next forward pass. -1: the router's own. None: of all tokens.

        Args:
            is_computed_again: the routers run once without gradients, and again in the backward pass.
        """
        for number, layer in enumerate(self._layers, start=self._first_layer):
            layer.next_Tk = None if experts_TLk is None else experts_TLk[:, number]
            layer.is_computed_again = is_computed_again


class _Layer:
    """Choices of one layer, with the method that Megatron's ``TopKRouter`` calls."""

    def __init__(self) -> None:
        self.next_Tk: Tensor | None = None
        self.is_computed_again = False
        # Of forward passes whose backward pass is to come, in their order.
        self._to_come: deque[Tensor | None] = deque()

    def get_replay_topk(
        self,
        scores_TE: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the chosen experts, both ``[T, k]``."""
        assert default_compute_topk is not None
        highest_Tk, own_Tk = default_compute_topk(scores_TE, topk, num_groups, group_topk)
        chosen_Tk = self._take()
        if chosen_Tk is None:
            return highest_Tk, own_Tk
        experts_Tk = torch.where(chosen_Tk < 0, own_Tk, chosen_Tk.long())
        return scores_TE.gather(1, experts_Tk), experts_Tk

    def _take(self) -> Tensor | None:
        if not self.is_computed_again:
            return self.next_Tk
        # Another micro-batch may have begun since.
        if torch.is_grad_enabled():
            return self._to_come.popleft()
        self._to_come.append(self.next_Tk)
        return self.next_Tk
