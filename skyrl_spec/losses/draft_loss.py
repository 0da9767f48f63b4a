"""The draft's loss as ``loss_type`` says: one kind, or a weighted sum of kinds. See ``settings.loss_type``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skyrl_spec.losses.chains import sum_over_chains, term_type
from skyrl_spec.losses.soft_ce import DraftLoss, vocab_parallel_soft_ce
from skyrl_spec.settings.loss_type import parse_loss_type


def draft_loss(
    loss_type: str,
    draft_hidden_KTD: Tensor,
    teacher_hidden_TD: Tensor,
    output_weight_vD: Tensor,
    weights_KT: Tensor,
    place_KT: Tensor,
    chains: tuple[int, int],
    **options: Any,
) -> tuple[Tensor, DraftLoss]:
    """The loss, and the terms of its first kind. Every further kind computes the logits again.

    Args:
        place_KT: place of each entry among the chains (``losses.chains``).
        chains: number of depths and of chains.
        options: of ``vocab_parallel_soft_ce``, as the other tensors.
    """
    kinds, losses = parse_loss_type(loss_type), []
    results = [
        vocab_parallel_soft_ce(
            draft_hidden_KTD, teacher_hidden_TD, output_weight_vD, weights_KT, loss_type=term_type(kind), **options
        )
        for _, kind in kinds
    ]
    for (weight, kind), result in zip(kinds, results, strict=True):
        loss = sum_over_chains(kind, result.loss_KT.flatten(), weights_KT.flatten(), place_KT.flatten(), *chains)
        losses.append(loss if weight == 1 else weight * loss)
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(), results[0]
