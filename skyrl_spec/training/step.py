"""Policy log-probs and policy loss of one micro-batch, without Ray, optimizers or schedules.

Shapes: T tokens of the pack, N response tokens, D hidden, v this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.algorithms.kl import kl_k3
from skyrl_spec.algorithms.policy_loss import POLICY_LOSSES, ResponseTokens
from skyrl_spec.algorithms.token_loss import truncated_importance
from skyrl_spec.losses.logprobs import TokenLogprobs, vocab_parallel_logprobs
from skyrl_spec.models.context_parallel import ContextRanks, Reach, placed
from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.settings.algorithm import AlgorithmConfig
from skyrl_spec.types import TrainBatch


@dataclass(frozen=True)
class Micro:
    """A micro-batch: a pack, and what the policy's loss needs for each of its response tokens."""

    # Numbers of the documents in the batch, for the host.
    rows: tuple[int, ...]
    pack: Pack
    # Row, among this rank's tokens, of the position before each response token, and the token. With context
    # parallelism only of the response tokens ``own_n``, whose log-probs this rank computes.
    position_n: Tensor
    target_n: Tensor
    own_n: Tensor | None
    # Index of each response token's row in ``rows``, and the number of response tokens of each row.
    response_N: Tensor
    lengths_R: Tensor
    loss_weights_N: Tensor
    advantages_N: Tensor
    rollout_logprobs_N: Tensor
    policy_logprobs_N: Tensor | None
    ref_logprobs_N: Tensor | None


def build_micro(batch: TrainBatch, rows: np.ndarray, context: ContextRanks | None = None) -> Micro:
    """The micro-batch of these rows of ``batch``, on the CPU. Without rows, one token that has no loss.

    Args:
        context: ranks that divide the pack.
    """
    if not len(rows):
        return _nothing(context)
    lengths = batch.lengths[rows]
    is_token_BS = np.arange(batch.token_ids.shape[1]) < lengths[:, None]
    loss_mask_T = batch.loss_mask[rows][is_token_BS]
    pack = pack_documents(batch.token_ids[rows][is_token_BS], loss_mask_T, lengths.tolist())
    pack = replace(pack, experts_TLk=_experts(batch, rows))
    pack = pack if context is None else context.divide(pack)
    index_N = np.flatnonzero(loss_mask_T)
    own_n, position_n = _own(pack, index_N - 1)
    lengths_R = (batch.loss_mask[rows] & is_token_BS).sum(axis=1)

    def of_responses(values_BS: np.ndarray) -> Tensor:
        return torch.from_numpy(values_BS[rows][batch.loss_mask[rows] & is_token_BS])

    return Micro(
        rows=tuple(rows.tolist()),
        pack=pack,
        position_n=position_n,
        target_n=pack.token_ids_T[index_N if own_n is None else index_N[own_n.numpy()]],
        own_n=own_n,
        response_N=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths_R)),
        lengths_R=torch.from_numpy(lengths_R),
        loss_weights_N=of_responses(batch.loss_weights),
        advantages_N=of_responses(batch.advantages),
        rollout_logprobs_N=of_responses(batch.rollout_logprobs),
        policy_logprobs_N=None if batch.policy_logprobs is None else of_responses(batch.policy_logprobs),
        ref_logprobs_N=None if batch.ref_logprobs is None else of_responses(batch.ref_logprobs),
    )


def _experts(batch: TrainBatch, rows: np.ndarray) -> Tensor | None:
    """Experts of these rows, end to end: ``[T, L, k]``."""
    known = [batch.experts[row] for row in rows] if batch.experts is not None else []
    shape = next((one.shape[1:] for one in known if one is not None), None)
    if shape is None:
        return None
    parts = []
    for length, of_row in zip(batch.lengths[rows], known, strict=True):
        experts_tLk = np.full((length, *shape), -1, np.int16)
        if of_row is not None:
            experts_tLk[: len(of_row)] = of_row[:length]
        parts.append(experts_tLk)
    return torch.from_numpy(np.concatenate(parts))


def _own(pack: Pack, position_N: np.ndarray) -> tuple[Tensor | None, Tensor]:
    """Indices of the positions whose tokens this rank has (None: all), and their rows among its tokens."""
    if pack.share is None:
        return None, torch.from_numpy(position_N)
    own_n = pack.owned(position_N)
    return torch.from_numpy(own_n), Reach.of(pack, 0).row_P[torch.from_numpy(position_N[own_n])]


def _nothing(context: ContextRanks | None) -> Micro:
    index, value = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    pack = pack_documents(np.zeros(1, np.int64), np.zeros(1, bool), [1])
    if context is not None:
        pack = context.divide(pack)
    own = None if context is None else index
    return Micro((), pack, index, index, own, index, index, value, value, value, value, value)


def response_logprobs(
    hidden_TD: Tensor,
    output_weight_vD: Tensor,
    micro: Micro,
    *,
    vocab_size: int,
    temperature: float,
    chunk_size: int,
    group: torch.distributed.ProcessGroup,
    fp32_logits: bool = False,
) -> TokenLogprobs:
    """Log-prob of every response token, and entropy of the distribution at the position before it.

    ``hidden_TD`` has this rank's tokens. The result is that of all ranks, which compute the loss of it alike.
    """
    own = vocab_parallel_logprobs(
        hidden_TD[micro.position_n],
        output_weight_vD,
        micro.target_n,
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_size=chunk_size,
        group=group,
        fp32_logits=fp32_logits,
    )
    if micro.own_n is None:
        return own
    logprobs_N, entropy_N = placed(torch.stack(own), micro.own_n, len(micro.loss_weights_N), micro.pack.share)
    return TokenLogprobs(logprobs_N, entropy_N.detach())


def in_rows(batch: TrainBatch, rows: np.ndarray, micros: Sequence[Micro], logprobs: Sequence[Tensor]) -> np.ndarray:
    """Log-probs of the response tokens of ``micros``, which hold the ascending ``rows``: ``[len(rows), S]``, else 0."""
    if not len(rows):
        return np.zeros((0, batch.token_ids.shape[1]), np.float32)
    packed_rows = np.concatenate([np.asarray(micro.rows, np.int64) for micro in micros])
    is_response_BS = batch.loss_mask[packed_rows]
    packed_BS = np.zeros(is_response_BS.shape, np.float32)
    packed_BS[is_response_BS] = torch.cat([part.float() for part in logprobs]).cpu().numpy()
    return packed_BS[np.argsort(packed_rows)]


def _anchor(tokens: TokenLogprobs, micro: Micro, anchor: str) -> Tensor:
    """Log-probs that the policy is compared with."""
    if anchor == "rollout":
        return micro.rollout_logprobs_N
    # In a single update, the policy before the step is the policy itself.
    return tokens.logprobs_T.detach() if micro.policy_logprobs_N is None else micro.policy_logprobs_N


# Order of the sums of ``policy_loss``.
POLICY_SUMS = ("policy_loss", "entropy", "clip_ratio", "kl")


def policy_loss(
    tokens: TokenLogprobs, micro: Micro, algorithm: AlgorithmConfig, *, anchor: str = "old", has_tis: bool = False
) -> tuple[Tensor, Tensor]:
    """This micro-batch's part of the policy loss, and sums for metrics.

    The loss is ``sum(loss_weights * (surrogate + kl_loss_coef * kl))``. The weights carry the global denominator.

    Args:
        anchor: what the policy is compared with (``algorithm.ratio_anchor``).
        has_tis: each token's loss is weighted with its truncated importance (``algorithm.use_tis``).

    Returns:
        The loss (a scalar, connected to the trunk even without tokens), and float64 ``[len(POLICY_SUMS) + 1]``: sums
        in the order of ``POLICY_SUMS``, then the number of tokens.
    """
    old_N = _anchor(tokens, micro, anchor)
    responses = ResponseTokens(tokens.logprobs_T, old_N, micro.advantages_N, micro.response_N, micro.lengths_R)
    loss_N, clipped_N = POLICY_LOSSES[algorithm.policy_loss_type](responses, algorithm)
    if has_tis:
        loss_N = loss_N * truncated_importance(old_N, micro.rollout_logprobs_N, algorithm.tis_imp_ratio_cap)
    kl_N = torch.zeros_like(loss_N)
    if micro.ref_logprobs_N is not None:
        kl_N = kl_k3(tokens.logprobs_T, micro.ref_logprobs_N)
        loss_N = loss_N + algorithm.kl_loss_coef * kl_N
    loss = (micro.loss_weights_N * loss_N).sum()
    sums = torch.stack(
        [
            loss.detach().double(),
            tokens.entropy_T.double().sum(),
            clipped_N.double().sum(),
            kl_N.detach().double().sum(),
            torch.full_like(loss.detach(), len(loss_N), dtype=torch.float64),
        ]
    )
    return loss, sums
