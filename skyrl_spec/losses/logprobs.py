"""Log-probs of given tokens over a sharded vocabulary, one chunk of tokens at a time.

The forward pass keeps only tensors of shape [T]. The backward pass computes the logits of each chunk again, and the
saved log-sum-exp turns them into the softmax.

Shape suffixes: T tokens, D hidden, v this rank's shard of the vocabulary, c tokens of one chunk, R ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from skyrl_spec.losses.vocab_parallel import (
    ChunkLogits,
    Normaliser,
    VocabShard,
    all_gather_columns,
    compute_dtype,
    counted_chunks,
    row_dot,
    vocab_shard,
)


class TokenLogprobs(NamedTuple):
    """Log-probs of the target tokens (differentiable) and entropy in nats of the distribution (detached)."""

    logprobs_T: Tensor
    entropy_T: Tensor


def vocab_parallel_logprobs(
    hidden_TD: Tensor,
    output_weight_vD: Tensor,
    targets_T: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    chunk_size: int,
    group: ProcessGroup | None,
    fp32_logits: bool = False,
) -> TokenLogprobs:
    """``log softmax(hidden W^T / temperature)[target]`` and the entropy of that softmax.

    Gradient reaches ``hidden_TD`` (one all-reduce over ``group`` makes it complete on every rank) and
    ``output_weight_vD`` (this rank's shard; 0 in padded rows). A token whose log-prob has gradient 0 adds nothing to
    either; on a CPU it costs nothing in the backward pass. Second derivatives are not defined.

    Args:
        hidden_TD: hidden states after the final norm, in the dtype of the weight, equal on all ranks.
        output_weight_vD: this rank's shard of the padded output weight (rank r: rows [r v, (r + 1) v)).
        targets_T: token ids. The result for an id outside the vocabulary is meaningless; give it no weight.
        vocab_size: number of tokens. Rows of the weight from there on are padding.
        temperature: above 0.
        chunk_size: number of tokens whose logits exist at a time: two float32 tensors [chunk_size, v], and one more in
            the dtype of the weight if that is 16 bits wide.
        group: tensor-parallel ranks; None if the weight is whole. One all-gather forward, one all-reduce backward.
        fp32_logits: with a 16-bit weight, float32 logits that are never rounded to 16 bits (``ChunkLogits``).

    Returns:
        Both [T], in float32, or float64 if the inputs are float64.
    """
    shard = vocab_shard(output_weight_vD, vocab_size, group, fp32_logits)
    logprobs_T, entropy_T = _VocabParallelLogprobs.apply(
        hidden_TD, output_weight_vD, targets_T, shard, temperature, chunk_size
    )
    return TokenLogprobs(logprobs_T, entropy_T)


@torch.no_grad()
def vocab_parallel_argmax(
    hidden_TD: Tensor,
    output_weight_vD: Tensor,
    *,
    vocab_size: int,
    chunk_size: int,
    group: ProcessGroup | None,
    fp32_logits: bool = False,
) -> Tensor:
    """Most probable token of each position, [T] int64; of several, the lowest id.

    The arguments are those of ``vocab_parallel_logprobs``.
    """
    shard = vocab_shard(output_weight_vD, vocab_size, group, fp32_logits)
    logits = ChunkLogits(shard, max(1, min(chunk_size, len(hidden_TD))), temperature=1.0)
    buffer = logits.buffer()
    best_2T = hidden_TD.new_zeros((2, len(hidden_TD)), dtype=logits.dtype)
    for start in range(0, len(hidden_TD), chunk_size):
        rows = slice(start, start + chunk_size)
        max_c, column_c = logits.write(hidden_TD[rows], buffer).max(-1)
        best_2T[:, rows] = torch.stack([max_c, shard.to_global(column_c, max_c.dtype)])
    max_RT, argmax_RT = all_gather_columns(list(best_2T), shard.group)
    return argmax_RT.gather(0, max_RT.argmax(0)[None])[0].long()


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        output_weight_vD: Tensor,
        targets_T: Tensor,
        shard: VocabShard,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        stats_4T = hidden_TD.new_zeros((4, len(hidden_TD)), dtype=compute_dtype(hidden_TD))
        logits = ChunkLogits(shard, min(chunk_size, len(hidden_TD)), temperature)
        logits_buffer, exp_buffer = logits.buffer(), logits.buffer()
        for start in range(0, len(hidden_TD), chunk_size):
            rows = slice(start, start + chunk_size)
            logits_cv = logits.write(hidden_TD[rows], logits_buffer)
            stats_4T[:, rows] = _local_stats(logits_cv, exp_buffer, targets_T[rows], shard)
        max_RT, sum_RT, dot_RT, target_RT = all_gather_columns(list(stats_4T), shard.group)
        normaliser = Normaliser.combine(max_RT, sum_RT)
        # sum_v q_v (logits_v - max), from each rank's sum of exp(logits - its max) * (logits - its max).
        mean_T = (normaliser.share_Rc * (dot_RT + (max_RT - normaliser.max_c) * sum_RT)).sum(0)
        logprobs_T = target_RT.sum(0) - normaliser.lse_c
        entropy_T = normaliser.log_sum_c - mean_T
        ctx.save_for_backward(hidden_TD, output_weight_vD, targets_T, normaliser.lse_c)
        ctx.shard, ctx.temperature, ctx.chunk_size = shard, temperature, chunk_size
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, output_weight_vD, targets_T, lse_T = ctx.saved_tensors
        grad_hidden_TD = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight_vD = (
            torch.zeros_like(output_weight_vD, dtype=compute_dtype(hidden_TD)) if ctx.needs_input_grad[1] else None
        )
        logits = ChunkLogits(ctx.shard, min(ctx.chunk_size, len(hidden_TD)), ctx.temperature)
        buffer = logits.buffer()
        counts_T = grad_logprobs_T != 0
        # A token that does not count may be NaN, and 0 * NaN is NaN.
        lse_T = lse_T.masked_fill(~counts_T, torch.inf)
        for positions_c in counted_chunks(counts_T, ctx.chunk_size):
            hidden_cD = hidden_TD[positions_c].masked_fill(~counts_T[positions_c, None], 0)
            softmax_cv = logits.write(hidden_cD, buffer).sub_(lse_T[positions_c, None]).exp_()
            column_c, is_local_c = ctx.shard.to_local(targets_T[positions_c])
            softmax_cv.scatter_add_(1, column_c[:, None], -is_local_c[:, None].to(softmax_cv.dtype))
            # Row factors multiply the [c, D] side of both products, which has fewer elements.
            dlogits_cv = logits.operand(softmax_cv)
            factor_c1 = -grad_logprobs_T[positions_c, None] / ctx.temperature
            if grad_hidden_TD is not None:
                grad_cD = torch.mm(dlogits_cv, ctx.shard.weight_vD) * factor_c1
                grad_hidden_TD[positions_c] = grad_cD.to(hidden_TD.dtype)
            if grad_weight_vD is not None:
                scaled_cD = (hidden_cD * factor_c1).to(hidden_TD.dtype)
                grad_weight_vD[: len(ctx.shard.weight_vD)] += torch.mm(dlogits_cv.t(), scaled_cD)
        if grad_hidden_TD is not None and ctx.shard.group is not None:
            dist.all_reduce(grad_hidden_TD, group=ctx.shard.group)
        if grad_weight_vD is not None:
            grad_weight_vD = grad_weight_vD.to(output_weight_vD.dtype)
        return grad_hidden_TD, grad_weight_vD, None, None, None, None


def _local_stats(logits_cv: Tensor, exp_buffer: Tensor, targets_c: Tensor, shard: VocabShard) -> Tensor:
    """This rank's part of the statistics of a chunk, [4, c].

    They are the maximum, the sum of e = exp(logits - max), the sum of e * (logits - max), and the target's logit (0 if
    another rank holds the target). Overwrites the logits.
    """
    column_c, is_local_c = shard.to_local(targets_c)
    target_c = logits_cv.gather(1, column_c[:, None])[:, 0] * is_local_c
    max_c = logits_cv.amax(-1)
    shifted_cv = logits_cv.sub_(max_c[:, None])
    exp_cv = torch.exp(shifted_cv, out=exp_buffer[: len(shifted_cv)])
    return torch.stack([max_c, exp_cv.sum(-1), row_dot(exp_cv, shifted_cv), target_c])
