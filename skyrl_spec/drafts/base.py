"""The one interface of a draft. The worker and the loop know this and nothing of any particular draft.

Shapes: T tokens, B batch, S sequence, D hidden, v this rank's vocabulary shard, K draft depths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from skyrl_spec.metrics import names
from skyrl_spec.models.capture import CapturePoint
from skyrl_spec.models.conversion import Rule
from skyrl_spec.types import Metric, Metrics


@dataclass(frozen=True)
class BatchTokens:
    """The tokens of a micro-batch, ``[B, S]``, on the device."""

    token_ids: Tensor
    segment_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor | None


@dataclass(frozen=True)
class Teacher:
    """The policy as it is now, detached: its distribution of the same forward pass, and its embedding.

    The distribution is ``softmax(hidden W^T / temperature)``.
    """

    hidden_SBD: Tensor
    output_weight_vD: Tensor
    # Token ids of any shape -> their rows of the embedding; on all tensor-parallel ranks together.
    embed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Supervision:
    """Which draft tokens of a micro-batch are supervised; a draft adds what it needs to know of them."""

    targets: BatchTokens
    # What they count together (float64 scalar): this rank's part of the loss's denominator.
    weight: Tensor


@dataclass(frozen=True)
class DraftSums:
    """Sums of a micro-batch (float64, no gradient), divided once they are added up over all ranks.

    Of K drafted tokens each: how many are supervised, and at how many the draft's favourite is the policy's. Then, of
    chains of K drafted tokens, how many are expected to be accepted that far (``align.expected_acceptance``). Where all
    chains are trained they are those that an engine would have begun (``align.followed_acceptance``), else the ones
    that are supervised to their end.
    """

    loss: Tensor
    top1_agreements_K: Tensor
    num_targets_K: Tensor
    accepted_K: Tensor
    num_chains: Tensor

    def flat(self) -> Tensor:
        """All of it, ``[3 K + 2]``."""
        scalars = torch.stack([self.loss, self.num_chains])
        return torch.cat([scalars, self.top1_agreements_K, self.num_targets_K, self.accepted_K])


def num_sums(num_speculative: int) -> int:
    """Length of ``DraftSums.flat``."""
    return 2 + 3 * num_speculative


def draft_metrics(sums: list[float]) -> Metrics:
    """The metrics of summed ``DraftSums.flat``."""
    loss, num_chains, *positions = sums
    num_positions = len(positions) // 3
    top1, num_targets, accepted = (positions[part * num_positions :][:num_positions] for part in range(3))
    metrics = {
        names.DRAFT_LOSS: Metric(loss, 1),
        names.DRAFT_TOP1: Metric(sum(top1), sum(num_targets)),
        names.PREDICTED_ACCEPTANCE_LENGTH: Metric(num_chains + sum(accepted), num_chains),
    }
    for position in range(num_positions):
        metrics[names.draft_top1_pos(position + 1)] = Metric(top1[position], num_targets[position])
        metrics[names.predicted_acceptance_pos(position + 1)] = Metric(accepted[position], num_chains)
    return metrics


class Draft(ABC):
    """A draft: a Megatron module that sees detached trunk tensors, and how it is trained and served."""

    module: MegatronModule
    # Names and layout in which vLLM loads the draft.
    rules: list[Rule]
    # The checkpoint directory that holds the draft's tensors: the policy's own, or the draft's.
    source: Path
    # The trunk tensors that ``loss`` wants.
    capture_points: tuple[CapturePoint, ...]
    # Drafted tokens of a chain, K.
    num_positions: int
    # Logits of the loss are computed in float32 from a shorter dtype (``losses.vocab_parallel.ChunkLogits``).
    fp32_logits: bool = False

    @abstractmethod
    def supervise(self, targets: BatchTokens) -> Supervision:
        """What is supervised in a micro-batch. Once for each: a plan may be drawn at random."""

    @abstractmethod
    def loss(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, supervise: Supervision, denominator: Tensor
    ) -> tuple[Tensor, DraftSums]:
        """This micro-batch's part of the loss, already divided by the global ``denominator``, and its sums.

        Gradient reaches the parameters of ``module`` alone. Without a supervised token the loss is a zero that is
        still connected to them.
        """

    @abstractmethod
    def propose(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, targets: BatchTokens, anchor_B: Tensor
    ) -> Tensor:
        """What the draft drafts behind one token of each row, as an engine does: ``[B, K, D]``, ready for the head.

        Entry k is of token ``anchor + 1 + k``; a draft that feeds on its own tokens takes them from the row. Rows have
        K tokens or more behind their anchor.
        """

    def random_state(self) -> dict[str, Tensor]:
        """What ``plan`` draws from; empty where nothing is drawn."""
        return {}

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """As ``random_state`` gave it; nothing where it is of a draft that draws nothing."""
        return None

    def hf_config(self, dtype: torch.dtype) -> dict[str, Any] | None:
        """``config.json`` of the exported draft, if it has a directory of its own."""
        return None
