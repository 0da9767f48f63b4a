"""Policy log-probs and policy loss of one micro-batch, without Ray, optimizers or schedules.

Shapes: T response tokens, B batch, S sequence, D hidden, v this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.algorithms.clipped_surrogate import policy_token_loss
from skyrl_spec.algorithms.kl import kl_k3
from skyrl_spec.drafts.base import BatchTokens
from skyrl_spec.losses.logprobs import TokenLogprobs, vocab_parallel_logprobs
from skyrl_spec.models.policy import document_mask
from skyrl_spec.settings.schema import AlgorithmConfig
from skyrl_spec.types import TrainBatch


@dataclass(frozen=True)
class Micro:
    """A micro-batch on the device, with the indices of its response tokens."""

    targets: BatchTokens
    # Row and position of each response token.
    row_T: Tensor
    position_T: Tensor
    batch: TrainBatch

    def pick(self, values_BS: np.ndarray) -> Tensor:
        """Entries of a ``[B, S]`` array at the response tokens, ``[T]``, on the device."""
        device = self.row_T.device
        return torch.as_tensor(np.ascontiguousarray(values_BS)).to(device)[self.row_T, self.position_T]


def to_device(batch: TrainBatch, device: torch.device) -> Micro:
    """Micro-batch with the tensors that a forward pass needs on ``device``."""
    token_ids, segment_ids, loss_mask = (
        torch.as_tensor(np.ascontiguousarray(array)).to(device)
        for array in (batch.token_ids, batch.segment_ids, batch.loss_mask)
    )
    row_T, position_T = loss_mask.nonzero(as_tuple=True)
    return Micro(
        targets=BatchTokens(token_ids, segment_ids, loss_mask, document_mask(segment_ids)),
        row_T=row_T,
        position_T=position_T,
        batch=batch,
    )


def response_logprobs(
    hidden_SBD: Tensor,
    output_weight_vD: Tensor,
    micro: Micro,
    *,
    vocab_size: int,
    temperature: float,
    chunk_size: int,
    group: torch.distributed.ProcessGroup,
    fp32_logits: bool = False,
) -> TokenLogprobs:
    """Log-prob of every response token, and entropy of the distribution at the position before it."""
    return vocab_parallel_logprobs(
        hidden_SBD[micro.position_T - 1, micro.row_T],
        output_weight_vD,
        micro.targets.token_ids[micro.row_T, micro.position_T],
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_size=chunk_size,
        group=group,
        fp32_logits=fp32_logits,
    )


# Order of the sums of ``policy_loss``.
POLICY_SUMS = ("policy_loss", "entropy", "clip_ratio", "kl")


def policy_loss(tokens: TokenLogprobs, micro: Micro, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """This micro-batch's part of the policy loss, and sums for metrics.

    The loss is ``sum(loss_weights * (surrogate + kl_loss_coef * kl))``. The weights carry the global denominator.

    Returns:
        The loss (a scalar, connected to the trunk even without tokens), and float64 ``[len(POLICY_SUMS) + 1]``: sums
        in the order of ``POLICY_SUMS``, then the number of tokens.
    """
    batch = micro.batch
    assert batch.policy_logprobs is not None
    old_T, rollout_T = micro.pick(batch.policy_logprobs), micro.pick(batch.rollout_logprobs)
    surrogate = policy_token_loss(
        tokens.logprobs_T,
        old_T,
        micro.pick(batch.advantages),
        eps_clip_low=algorithm.eps_clip_low,
        eps_clip_high=algorithm.eps_clip_high,
        clip_ratio_c=algorithm.clip_ratio_c,
        rollout_logprobs=rollout_T if algorithm.use_tis else None,
        tis_imp_ratio_cap=algorithm.tis_imp_ratio_cap if algorithm.use_tis else None,
    )
    loss_T, kl_T = surrogate.loss, torch.zeros_like(surrogate.loss)
    if batch.ref_logprobs is not None:
        kl_T = kl_k3(tokens.logprobs_T, micro.pick(batch.ref_logprobs))
        loss_T = loss_T + algorithm.kl_loss_coef * kl_T
    loss = (micro.pick(batch.loss_weights) * loss_T).sum()
    sums = torch.stack(
        [
            loss.detach().double(),
            tokens.entropy_T.double().sum(),
            surrogate.clipped.double().sum(),
            kl_T.detach().double().sum(),
            torch.tensor(float(len(loss_T)), dtype=torch.float64, device=loss.device),
        ]
    )
    return loss, sums
