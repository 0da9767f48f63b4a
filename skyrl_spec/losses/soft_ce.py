"""The draft's loss: its distance from the policy's distribution, over a sharded vocabulary, in chunks.

A plain implementation keeps the logits of all tokens and their log-softmax for the backward pass: several [K, T, V]
tensors. Here only the draft's hidden states get a gradient, and the two softmaxes alone give it::

    term                    = CE(p, q)                     or  1 - sum_v min(p_v, q_v), the total variation distance
    d term / d draft_logits = (q - p) / temperature        or  q (sum_v q_v [q_v < p_v] - [q < p]) / temperature
    d term / d draft_hidden = (d term / d draft_logits) @ W

The forward pass therefore finishes the gradient of every term ([c, D] of a chunk) while its logits exist, and
overwrites them with the logits of the next chunk. The backward pass is one multiplication by the incoming gradient of
each term. Nothing is computed twice, and the K drafts of a target position share the teacher's logits.

One minus the total variation distance, ``sum_v min(p_v, q_v)``, is the probability that exact rejection sampling
accepts a token that the draft samples. It accepts the draft's most probable token with probability p of that token.

The distances from the policy's distribution p, by ``loss_type``:

- ``soft_ce``: cross-entropy against p
- ``topk_soft_ce``: cross-entropy against p, restricted to its ``topk`` most probable tokens and renormalised. Tokens
  that tie for the last place are all kept.
- ``hard_ce``: cross-entropy against the sampled token
- ``tv``: total variation distance from p

Shape suffixes: K drafts (depths), T target positions, D hidden, v this rank's shard of the vocabulary, c tokens of one
chunk, R ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from skyrl_spec.losses.truncation import keep_most_probable_, keep_nucleus_, keep_top_k_
from skyrl_spec.losses.vocab_parallel import (
    ChunkLogits,
    Normaliser,
    VocabShard,
    all_gather_columns,
    counted_chunks,
    exp_minus_max_,
    row_blocks,
    row_dot,
    softmax_,
    vocab_shard,
)
from skyrl_spec.settings.allowed import TERM_TYPES


class DraftLoss(NamedTuple):
    """The loss, and its terms for every draft and target position. Where the weight is 0, a term is 0, False, or -1.

    ``loss`` and ``loss_KT`` are differentiable.
    """

    # Scalar.
    loss: Tensor
    # Before weighting.
    loss_KT: Tensor
    # How probably exact rejection sampling accepts the drafted token.
    accept_prob_KT: Tensor
    # The same, given that the token that is then sampled is labels_T: 0 or 1 for a greedy draft. Zeros without labels.
    accept_label_KT: Tensor
    # Bool: the draft's argmax is the teacher's.
    top1_KT: Tensor
    # Draft's most probable token, int64: the one that an engine drafts if it does not sample.
    argmax_KT: Tensor


def vocab_parallel_soft_ce(
    draft_hidden_KTD: Tensor,
    teacher_hidden_TD: Tensor,
    output_weight_vD: Tensor,
    weights_KT: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    chunk_size: int,
    group: ProcessGroup | None,
    loss_type: str = "soft_ce",
    topk: int = 32,
    labels_T: Tensor | None = None,
    fp32_logits: bool = False,
    top_k: int = -1,
    top_p: float = 1.0,
    samples_drafts: bool = False,
) -> DraftLoss:
    """``sum_{k,t} weights_KT * loss_KT`` with ``q = softmax(draft_hidden W^T / temperature)``.

    The terms are distances from ``p = softmax(teacher_hidden W^T / temperature)``, truncated by ``top_k`` and ``top_p``
    (``losses.truncation``). The head of this file lists them.

    Gradient reaches only ``draft_hidden_KTD``: output weight, teacher and token weights are constants. One all-reduce
    over ``group`` makes it complete on every rank. An entry of weight 0 adds nothing, even if its hidden state is NaN.

    Args:
        draft_hidden_KTD: hidden states of K drafts for each target position, after the draft's final norm.
        teacher_hidden_TD: the policy's hidden states at the same positions, in the dtype of the output weight.
        output_weight_vD: this rank's shard of the padded output weight (rank r: rows [r v, (r + 1) v)).
        weights_KT: weight of each entry, with the global denominator in it.
        vocab_size: number of tokens. Rows of the weight from there on are padding.
        temperature: of both distributions, above 0.
        chunk_size: number of target positions whose logits exist at a time: two float32 tensors [chunk_size, v] for
            ``soft_ce`` and ``tv``, else three, and one more in the dtype of the weight if that is 16 bits wide.
        group: tensor-parallel ranks; None if the weight is whole. All ranks hold the same hidden states and weights.
        loss_type: which distance. ``topk`` is for ``topk_soft_ce``.
        labels_T: token ids, for ``hard_ce``.
        fp32_logits: with a 16-bit weight, float32 logits that are never rounded to 16 bits (``ChunkLogits``).
        top_k: the engines sample from this many tokens, and with ``top_p`` from a nucleus. -1 and 1: from all.
        samples_drafts: the engines sample drafted tokens from q. False: they draft its most probable token.

    Raises:
        ValueError: an unknown loss type, or ``hard_ce`` without labels.
    """
    _check_loss_type(loss_type, labels_T)
    with_grad = torch.is_grad_enabled() and draft_hidden_KTD.requires_grad
    with torch.no_grad():
        shard = vocab_shard(output_weight_vD, vocab_size, group, fp32_logits)
        counts_T = weights_KT.ne(0).any(0)
        chunks = counted_chunks(counts_T, chunk_size)
        logits = ChunkLogits(shard, min(len(counts_T), chunk_size), temperature)
        teacher = _TeacherChunks(teacher_hidden_TD, counts_T, logits, loss_type, topk, labels_T, top_k, top_p)
        terms, grad_KTD = _terms_and_grad(
            draft_hidden_KTD, weights_KT != 0, chunks, teacher, logits, with_grad, samples_drafts
        )
    loss_KT = terms.loss_KT
    if with_grad:
        loss_KT = _KnownGradient.apply(draft_hidden_KTD, loss_KT, grad_KTD)
    return terms._replace(loss=(weights_KT.detach().to(loss_KT.dtype) * loss_KT).sum(), loss_KT=loss_KT)


def _check_loss_type(loss_type: str, labels_T: Tensor | None) -> None:
    if loss_type not in TERM_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; allowed are {', '.join(TERM_TYPES)}; set one of these")
    if loss_type == "hard_ce" and labels_T is None:
        raise ValueError("loss_type='hard_ce' needs labels_T; pass the target tokens or choose another loss type")


class _KnownGradient(torch.autograd.Function):
    """Attaches the gradient of every term with respect to its hidden state, which was computed with the terms."""

    @staticmethod
    def forward(ctx: Any, hidden_KTD: Tensor, loss_KT: Tensor, grad_KTD: Tensor) -> Tensor:
        ctx.save_for_backward(grad_KTD)
        return loss_KT.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_KT: Tensor) -> tuple[Tensor, None, None]:
        (grad_KTD,) = ctx.saved_tensors
        # The product may be as small as 1e-6. bf16 keeps its digits, as it has the exponents of float32.
        return grad_KTD * grad_loss_KT[..., None].to(grad_KTD.dtype), None, None


def _terms_and_grad(
    draft_hidden_KTD: Tensor,
    counts_KT: Tensor,
    chunks: list[Tensor | slice],
    teacher: _TeacherChunks,
    logits: ChunkLogits,
    with_grad: bool,
    samples_drafts: bool,
) -> tuple[DraftLoss, Tensor | None]:
    """Terms of the loss, and the gradient of each with respect to its hidden state. ``loss`` is left at 0."""
    loss_KT, accept_prob_KT, accept_label_KT = (torch.zeros_like(counts_KT, dtype=logits.dtype) for _ in range(3))
    top1_KT, argmax_KT = torch.zeros_like(counts_KT), torch.full_like(counts_KT, -1, dtype=torch.int64)
    grad_KTD = torch.zeros_like(draft_hidden_KTD) if with_grad else None
    buffer = logits.buffer()
    for positions_c in chunks:
        targets = teacher.targets(positions_c)
        for k in range(len(counts_KT)):
            here = (k, positions_c)
            # An entry of weight 0 may be NaN, too.
            hidden_cD = draft_hidden_KTD[here].masked_fill(~counts_KT[here][:, None], 0)
            draft_cv = logits.write(hidden_cD, buffer)
            loss_KT[here], accept_prob_KT[here], argmax_c = _compare_(draft_cv, targets, logits.shard)
            top1_KT[here], argmax_KT[here] = argmax_c == targets.teacher_argmax_c, argmax_c.long()
            if samples_drafts:
                accept_prob_KT[here], accept_label_KT[here] = _acceptance_of_samples(draft_cv, targets, logits.shard)
            elif targets.label_c is not None:
                accept_label_KT[here] = (argmax_c == targets.label_c).to(logits.dtype)
            if teacher.loss_type == "tv":
                loss_KT[here] = _total_variation_(draft_cv, targets.teacher_cv, logits.shard)
            elif grad_KTD is not None:
                draft_cv.sub_(targets.target_cv)
            if grad_KTD is not None:
                grad_cD = torch.mm(logits.operand(draft_cv), logits.shard.weight_vD)
                scale_c = counts_KT[here].to(logits.dtype) / logits.temperature
                grad_KTD[here] = (grad_cD * scale_c[:, None]).to(grad_KTD.dtype)
    if grad_KTD is not None and logits.shard.group is not None:
        dist.all_reduce(grad_KTD, group=logits.shard.group)
    argmax_KT.masked_fill_(~counts_KT, -1)
    terms = DraftLoss(
        loss_KT.new_zeros(()),
        loss_KT * counts_KT,
        accept_prob_KT * counts_KT,
        accept_label_KT * counts_KT,
        top1_KT & counts_KT,
        argmax_KT,
    )
    return terms, grad_KTD


class _ChunkTargets(NamedTuple):
    """Target distribution of the cross-entropy, teacher distribution for the metrics, and labels, of one chunk."""

    target_cv: Tensor
    teacher_cv: Tensor
    teacher_argmax_c: Tensor
    label_c: Tensor | None


def _compare_(draft_cv: Tensor, targets: _ChunkTargets, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, acceptance probability and argmax id of each token. One collective.

    ``CE(p, q) = lse(logits) - sum_v p_v logits_v``. Overwrites the logits with their softmax.
    """
    max_c, column_c = draft_cv.max(-1)
    accept_prob_c = targets.teacher_cv.gather(1, column_c[:, None])[:, 0]
    dot_c = row_dot(targets.target_cv, draft_cv)
    sum_c = exp_minus_max_(draft_cv, max_c)
    argmax_c = shard.to_global(column_c, max_c.dtype)
    max_Rc, sum_Rc, dot_Rc, argmax_Rc, accept_prob_Rc = all_gather_columns(
        [max_c, sum_c, dot_c, argmax_c, accept_prob_c], shard.group
    )
    normaliser = Normaliser.combine(max_Rc, sum_Rc)
    draft_cv.mul_(normaliser.share_Rc[shard.rank][:, None])
    loss_c = normaliser.lse_c - dot_Rc.sum(0)
    return loss_c, normaliser.of_winner(accept_prob_Rc), normaliser.of_winner(argmax_Rc)


def _acceptance_of_samples(draft_cv: Tensor, targets: _ChunkTargets, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Probabilities that a token sampled from the draft's probabilities q is accepted. One collective.

    The first is ``sum_v min(p_v, q_v)``, the other ``min(1, q_x / p_x)`` for the label x: among all times that x is
    sampled, it is an accepted draft that often. Zeros without labels.
    """
    overlap_c = _overlap(draft_cv, targets.teacher_cv)
    if targets.label_c is None:
        overlap_c = all_gather_columns([overlap_c], shard.group)[0].sum(0)
        return overlap_c, torch.zeros_like(overlap_c)
    column_c, is_local_c = shard.to_local(targets.label_c)
    q_c, p_c = (probs_cv.gather(1, column_c[:, None])[:, 0] * is_local_c for probs_cv in (draft_cv, targets.teacher_cv))
    overlap_c, q_c, p_c = (values_Rc.sum(0) for values_Rc in all_gather_columns([overlap_c, q_c, p_c], shard.group))
    return overlap_c, (q_c / p_c.clamp(min=torch.finfo(p_c.dtype).tiny)).clamp(max=1.0)


def _overlap(draft_cv: Tensor, teacher_cv: Tensor) -> Tensor:
    """This rank's part of ``sum_v min(p_v, q_v)``, ``[c]``."""
    return torch.cat([torch.minimum(q, p).sum(-1) for q, p in row_blocks(draft_cv, teacher_cv)])


def _total_variation_(draft_cv: Tensor, teacher_cv: Tensor, shard: VocabShard) -> Tensor:
    """Total variation distance of each token. One collective.

    Overwrites the draft's probabilities with the gradient with respect to its logits, at temperature 1.
    """
    # Sum of q over the tokens that the draft finds less probable than the teacher.
    below_c = torch.cat([(q * (q < p)).sum(-1) for q, p in row_blocks(draft_cv, teacher_cv)])
    below_Rc, overlap_Rc = all_gather_columns([below_c, _overlap(draft_cv, teacher_cv)], shard.group)
    for q, p, below_b1 in row_blocks(draft_cv, teacher_cv, below_Rc.sum(0)[:, None]):
        q.mul_(below_b1 - (q < p).to(q.dtype))
    return 1 - overlap_Rc.sum(0)


class _TeacherChunks:
    """The policy's distribution over one chunk, and the target that the loss type derives from it."""

    def __init__(
        self,
        hidden_TD: Tensor,
        counts_T: Tensor,
        logits: ChunkLogits,
        loss_type: str,
        topk: int,
        labels_T: Tensor | None,
        top_k: int,
        top_p: float,
    ) -> None:
        self.hidden_TD, self.counts_T, self.logits, self.loss_type = hidden_TD, counts_T, logits, loss_type
        self.topk, self.labels_T, self.top_k, self.top_p = topk, labels_T, top_k, top_p
        self.buffer = logits.buffer()
        self.target_buffer = self.buffer if loss_type in ("soft_ce", "tv") else logits.buffer()

    def targets(self, positions_c: Tensor | slice) -> _ChunkTargets:
        """Targets of the positions, valid until the next call.

        One collective; two more for ``topk_soft_ce``, and those of ``losses.truncation``.
        """
        shard = self.logits.shard
        # A position that does not count may be NaN, and 0 * NaN is NaN.
        hidden_cD = self.hidden_TD[positions_c].masked_fill(~self.counts_T[positions_c, None], 0)
        teacher_cv = self.logits.write(hidden_cD, self.buffer)
        argmax_c = self._to_probabilities_(teacher_cv)
        label_c = None if self.labels_T is None else self.labels_T[positions_c]
        # For soft_ce and tv, teacher and target are the same tensor.
        target_cv = self.target_buffer[: len(teacher_cv)]
        if self.loss_type == "topk_soft_ce":
            keep_most_probable_(target_cv.copy_(teacher_cv), self.topk, shard)
        elif label_c is not None and self.loss_type == "hard_ce":
            column_c, is_local_c = shard.to_local(label_c)
            target_cv.zero_().scatter_(1, column_c[:, None], is_local_c[:, None].to(target_cv.dtype))
        return _ChunkTargets(target_cv, teacher_cv, argmax_c, label_c)

    def _to_probabilities_(self, logits_cv: Tensor) -> Tensor:
        """Overwrites the logits with what the engines sample from; returns the most probable tokens ``[c]``."""
        shard = self.logits.shard
        if self.top_k > 0:
            keep_top_k_(logits_cv, self.top_k, shard)
        argmax_c = softmax_(logits_cv, shard)
        if self.top_p < 1:
            keep_nucleus_(logits_cv, self.top_p, shard)
        return argmax_c
