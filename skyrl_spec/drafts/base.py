"""Interface of a draft in training. The trainer uses it and knows no particular draft.

Shapes: T tokens of a pack, D hidden, v this rank's vocabulary shard, K draft depths. Where ranks divide a pack
(``models.context_parallel``), captured states and the teacher's hidden states are those of this rank's tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from skyrl_spec.drafts.shares import StepRandom
from skyrl_spec.metrics import names
from skyrl_spec.models.capture import CapturePoint
from skyrl_spec.models.conversion import Rule
from skyrl_spec.models.pack import Pack
from skyrl_spec.settings.schema import GeneratorConfig
from skyrl_spec.types import Metric, Metrics


class RolloutSampling(NamedTuple):
    """How the engines sample and draft. The fields are arguments of ``losses.soft_ce``."""

    temperature: float
    top_k: int
    top_p: float
    samples_drafts: bool

    @classmethod
    def of(cls, generator: GeneratorConfig) -> RolloutSampling:
        sampling = generator.sampling_params
        samples_drafts = generator.speculation.draft_sample_method == "probabilistic"
        return cls(sampling.temperature, sampling.top_k, sampling.top_p, samples_drafts)


@dataclass(frozen=True)
class Teacher:
    """The current policy, detached: its embedding, and the logits ``hidden W^T`` of its distribution.

    ``hidden_TD`` comes from the same forward pass as the captured states.
    """

    hidden_TD: Tensor
    output_weight_vD: Tensor
    # Token ids of any shape -> rows of the embedding. Collective over tensor-parallel ranks.
    embed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Supervision:
    """This rank's supervised draft tokens of a pack, or of a part of it. A draft adds what its loss needs."""

    # Sum of their weights: their part of the loss's denominator.
    weight: float


@dataclass(frozen=True)
class DraftSums:
    """This rank's sums of a micro-batch for metrics (float64, no gradient). Division follows the sum over all ranks."""

    loss: Tensor
    # Supervised tokens at which the draft's and the policy's most probable tokens are equal, by depth.
    top1_agreements_K: Tensor
    # Supervised tokens, by depth.
    num_targets_K: Tensor
    # Expected number of chains that an engine accepts up to this depth (``align.expected_acceptance``).
    accepted_K: Tensor
    # Chains in ``accepted_K``: those that an engine would begin (``align.followed_acceptance``), or, of a draft that is
    # trained on single blocks, all that are supervised to their end.
    num_chains: Tensor

    def flat(self) -> Tensor:
        """All sums in one tensor, ``[3 K + 2]``."""
        scalars = torch.stack([self.loss, self.num_chains])
        return torch.cat([scalars, self.top1_agreements_K, self.num_targets_K, self.accepted_K])


def num_sums(num_speculative: int) -> int:
    """Length of ``DraftSums.flat``."""
    return 2 + 3 * num_speculative


def draft_metrics(sums: list[float]) -> Metrics:
    """Metrics from the sum of all ranks' ``DraftSums.flat``."""
    loss, num_chains, *positions = sums
    num_positions = len(positions) // 3
    top1, num_targets, accepted = (positions[index * num_positions :][:num_positions] for index in range(3))
    metrics = {
        names.DRAFT_LOSS: Metric(loss, 1),
        names.DRAFT_TOP1: Metric(sum(top1), sum(num_targets)),
        names.PREDICTED_ACCEPTANCE_LENGTH: Metric(num_chains + sum(accepted), num_chains),
        names.PREDICTED_DRAFTS: Metric(num_chains, 1),
    }
    for position in range(num_positions):
        metrics[names.draft_top1_pos(position + 1)] = Metric(top1[position], num_targets[position])
        metrics[names.predicted_acceptance_pos(position + 1)] = Metric(accepted[position], num_chains)
    return metrics


class Draft(ABC):
    """A draft in training: a Megatron module on detached trunk states, and its loss."""

    module: MegatronModule
    # Conversion to the names and layout in which vLLM loads the draft.
    rules: list[Rule]
    # Checkpoint directory with the draft's tensors: the policy's, or the draft's own.
    source: Path
    # Trunk states that ``loss`` and ``propose`` need.
    capture_points: tuple[CapturePoint, ...]
    # K, the number of drafted tokens of a chain.
    num_positions: int
    # Of what is drawn for a step.
    random: StepRandom
    # Of the rollouts.
    sampling: RolloutSampling
    # The loss uses float32 logits of 16-bit weights (``losses.vocab_parallel.ChunkLogits``).
    fp32_logits: bool = False

    @abstractmethod
    def begin_step(self, loss_mask_BS: np.ndarray) -> None:
        """Draws what is trained on in an optimizer step, equal on all ranks. ``supervise`` calls follow.

        Args:
            loss_mask_BS: bool, response tokens that are trained on, of the mini-batch of all ranks.
        """

    @abstractmethod
    def supervise(self, pack: Pack, rows: Sequence[int]) -> tuple[Supervision, ...]:
        """Supervision of a pack on the CPU, as CPU tensors. A part for each forward pass of the draft.

        All ranks that share the pack get as many parts. One of them may supervise nothing.

        Args:
            rows: numbers of the pack's documents in the mini-batch.
        """

    def chances(self, pack: Pack, rows: Sequence[int]) -> Tensor:
        """Chance that decides whether a drafted token is taken as accepted, ``[K, T]`` on the CPU.

        A sampled draft is accepted with a probability. In predicted acceptance lengths it is accepted if that is above
        the chance. A greedy draft is accepted or not, and the chance is one half.
        """
        if not self.sampling.samples_drafts:
            return torch.full((), 0.5).expand(self.num_positions, len(pack.token_ids_T))
        lengths = np.diff(np.asarray(pack.documents.starts)).tolist()
        return torch.from_numpy(self.random.chances(rows, lengths, self.num_positions))

    @abstractmethod
    def loss(
        self,
        captured: dict[CapturePoint, Tensor],
        teacher: Teacher,
        pack: Pack,
        supervision: Supervision,
        denominator: Tensor,
    ) -> tuple[Tensor, DraftSums]:
        """This rank's part of the loss, divided by the global ``denominator``, and its sums.

        Collective over tensor-parallel ranks, and those that share the pack. Gradient reaches only ``module``.
        """

    @abstractmethod
    def propose(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, pack: Pack, anchors: Sequence[int]
    ) -> Tensor:
        """Hidden states of the tokens drafted after each of ``anchors``, as in an engine: ``[A, K, D]``.

        Entry k, which the output head turns into logits, drafts token ``anchor + 1 + k``. A draft that reads its own
        drafted tokens takes them from the pack, so every anchor, an index in the pack, has at least K tokens of its
        document behind it.
        """
