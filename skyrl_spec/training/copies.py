"""Copies of a draft's weights at earlier moments. They are scored on the same batch as the draft in training.

Copies lie in host memory. To run one, its weights take the place of the module's for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_spec.drafts.base import Draft, Supervision, Teacher
from skyrl_spec.metrics import names
from skyrl_spec.models.capture import CapturePoint
from skyrl_spec.models.pack import Pack
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.types import CANDIDATE, Metric, Metrics


@dataclass(frozen=True)
class Held:
    """Inputs of a draft's loss for one micro-batch, kept beyond the policy's backward pass."""

    states: dict[CapturePoint, Tensor]
    teacher: Teacher
    pack: Pack
    supervisions: tuple[Supervision, ...]


class DraftCopies:
    """Named copies of the weights of ``trainable``, as this rank holds them."""

    def __init__(self, trainable: Trainable):
        self._trainable, self._copies = trainable, dict[str, list[Tensor]]()

    def keep(self, name: str) -> None:
        """Copies the weights of now under ``name``."""
        self._copies[name] = [parameter.detach().cpu().clone() for parameter in self._parameters()]

    def restore(self, name: str) -> None:
        """Makes the copy the weights that training goes on from. Adam's moments stay."""
        self._load(self._copies[name])
        self._trainable.take_over_weights()

    @contextmanager
    def loaded(self, name: str) -> Iterator[None]:
        """Context in which the module has the weights of the copy. ``CANDIDATE`` is the module as it is."""
        if name == CANDIDATE:
            yield
            return
        current = [parameter.detach().clone() for parameter in self._parameters()]
        self._load(self._copies[name])
        try:
            yield
        finally:
            self._load(current)

    @torch.no_grad()
    def score(self, draft: Draft, held: Held, scored: Sequence[str]) -> Tensor:
        """This rank's accepted tokens and chains of each copy on ``held``, ``[copies, 2]`` float64.

        ``draft`` is the draft whose weights these are. Collective over tensor-parallel ranks.
        """
        device = held.teacher.hidden_TD.device
        sums = torch.zeros(len(scored), 2, dtype=torch.float64, device=device)
        one = torch.ones((), dtype=torch.float64, device=device)
        for index, copy in enumerate(scored):
            with self.loaded(copy):
                for supervision in held.supervisions:
                    _, part = draft.loss(held.states, held.teacher, held.pack, supervision, one)
                    sums[index] += torch.stack([part.accepted_K.sum(), part.num_chains])
        return sums

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return self._trainable.module.parameters()

    @torch.no_grad()
    def _load(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self._parameters(), weights, strict=True):
            parameter.copy_(weight)


def score_metrics(copies: tuple[str, ...], accepted_and_chains: list[float]) -> Metrics:
    """Predicted acceptance lengths of ``copies``, from pairs of accepted tokens and chains, summed over ranks."""
    pairs = zip(accepted_and_chains[::2], accepted_and_chains[1::2], strict=True)
    return {
        names.scored_acceptance_length(copy): Metric(chains + accepted, chains)
        for copy, (accepted, chains) in zip(copies, pairs, strict=True)
    }
