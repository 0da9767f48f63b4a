"""The one interface of a draft. The worker and the loop know this and nothing of any particular draft.

Shapes: T tokens, B batch, S sequence, D hidden, v this rank's vocabulary shard, K draft depths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from skyrl_spec.megatron.capture import CapturePoint
from skyrl_spec.megatron.conversion import Rule


@dataclass(frozen=True)
class Targets:
    """The tokens of a micro-batch, ``[B, S]``, on the device."""

    token_ids: Tensor
    segment_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor | None


@dataclass(frozen=True)
class Teacher:
    """The policy's own distribution of the same forward pass, detached: ``softmax(hidden W^T / temperature)``."""

    hidden_SBD: Tensor
    output_weight_vD: Tensor


@dataclass(frozen=True)
class DraftSums:
    """Sums of a micro-batch (float64 scalars, no gradient), divided once they are added up over all ranks."""

    loss: Tensor
    top1_agreements: Tensor
    num_targets: Tensor
    accepted_lengths: Tensor
    num_chains: Tensor

    def stack(self) -> Tensor:
        return torch.stack([self.loss, self.top1_agreements, self.num_targets, self.accepted_lengths, self.num_chains])


class Draft(ABC):
    """A draft: a Megatron module that sees detached trunk tensors, and how it is trained and served."""

    module: MegatronModule
    # Names and layout in which vLLM loads the draft.
    rules: list[Rule]
    # The trunk tensors that ``loss`` wants.
    capture_points: tuple[CapturePoint, ...]

    @abstractmethod
    def num_targets(self, targets: Targets) -> Tensor:
        """How many draft tokens of the batch are supervised (float64 scalar): this rank's part of the denominator."""

    @abstractmethod
    def loss(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, targets: Targets, denominator: Tensor
    ) -> tuple[Tensor, DraftSums]:
        """This micro-batch's part of the loss, already divided by the global ``denominator``, and its sums.

        Gradient reaches the parameters of ``module`` alone. Without a supervised token the loss is a zero that is
        still connected to them.
        """
