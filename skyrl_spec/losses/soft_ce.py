"""The draft's loss: cross entropy to the policy's own distribution, over a sharded vocabulary, a chunk at a time.

The usual way makes the logits of all tokens, keeps them (and their log-softmax) for the backward pass, and so needs
several [K, T, V] tensors. Here only the draft's hidden states get a gradient, and the gradient of a cross entropy is
known as soon as its softmax is::

    loss                    = sum_{k,t} w_kt CE(p_t, q_kt)
    d loss / d draft_logits = w_kt (q_kt - p_t) / temperature
    d loss / d draft_hidden = (d loss / d draft_logits) @ W

so the forward pass finishes the gradient of a chunk ([c, D]) while its logits are there, and then overwrites them with
those of the next. The backward pass is one multiplication by the incoming scalar. Nothing is computed twice, and the
K drafts of a target position share the teacher's logits.

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

from skyrl_spec.losses.vocab_parallel import (
    ChunkLogits,
    Normaliser,
    VocabShard,
    all_gather_columns,
    exp_minus_max_,
    nonzero_chunks,
    row_dot,
    softmax_,
    vocab_shard,
)
from skyrl_spec.settings.schema import LOSS_TYPES


class DraftLoss(NamedTuple):
    """The loss and, for every draft and target position, what it is made of; 0 (False) where the weight is 0.

    ``argmax_KT`` is the draft's favourite, which an engine drafts, and -1 where the weight is 0. ``accept_prob_KT`` is
    the teacher's probability of it: the probability with which exact rejection sampling accepts a greedily drafted
    token.
    """

    loss: Tensor  # scalar, differentiable
    loss_KT: Tensor  # detached CE, before weighting
    accept_prob_KT: Tensor  # detached
    top1_KT: Tensor  # bool: draft argmax == teacher argmax
    argmax_KT: Tensor  # int64


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
) -> DraftLoss:
    """``sum_{k,t} weights_KT * CE(target_t, q_kt)`` with ``q = softmax(draft_hidden W^T / temperature)``.

    The target, by ``loss_type``, with ``p = softmax(teacher_hidden W^T / temperature)``:

    - ``soft_ce``: p
    - ``topk_soft_ce``: p restricted to its ``topk`` most probable tokens (all of those that tie for the last place)
      and renormalised
    - ``hard_ce``: the token ``labels_T``

    Gradient reaches ``draft_hidden_KTD`` alone; weight, teacher and token weights are constants. It is complete on
    every rank (one all-reduce over ``group``). Where the weight is 0 nothing counts, not even a hidden state that is
    NaN.

    Args:
        draft_hidden_KTD: hidden states of K drafts for each target position, ready for the output weight.
        teacher_hidden_TD: the policy's, for the same target positions; same dtype as the output weight.
        output_weight_vD: this rank's shard of the padded output weight (rank r: rows [r v, (r + 1) v)).
        weights_KT: what each entry counts; the one global denominator is in here.
        vocab_size: tokens of the vocabulary; rows of the weight from there on are padding.
        temperature: of both distributions, above 0.
        chunk_size: target positions whose logits exist at a time: at most two float32 [chunk_size, v] (three but for
            ``soft_ce``), and one in the dtype of the weight if that is a shorter one.
        group: tensor-parallel ranks; None: the weight is whole. Every rank has the same hidden states and weights.
        loss_type: see above.
        topk: for ``topk_soft_ce``.
        labels_T: for ``hard_ce``, token ids.
        fp32_logits: with a shorter dtype, logits in float32 that were never rounded to it (``ChunkLogits``).

    Raises:
        ValueError: an unknown loss type, or ``hard_ce`` without labels.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; allowed are {', '.join(LOSS_TYPES)}; set one of these")
    if loss_type == "hard_ce" and labels_T is None:
        raise ValueError("loss_type='hard_ce' needs labels_T; pass the target tokens or take another loss type")
    with_grad = torch.is_grad_enabled() and draft_hidden_KTD.requires_grad
    with torch.no_grad():
        shard = vocab_shard(output_weight_vD, vocab_size, group, fp32_logits)
        # Positions that no draft counts (prompts, padding) cost nothing.
        chunks = nonzero_chunks(weights_KT.ne(0).any(0), chunk_size)
        logits = ChunkLogits(shard, max(map(len, chunks), default=0), temperature)
        teacher = _TeacherChunks(teacher_hidden_TD, logits, loss_type, topk, labels_T)
        result, grad_KTD = _loss_and_grad(draft_hidden_KTD, weights_KT, chunks, teacher, logits, with_grad)
    if with_grad:
        result = result._replace(loss=_KnownGradient.apply(draft_hidden_KTD, result.loss, grad_KTD))
    return result


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient with respect to ``hidden`` was computed with it."""

    @staticmethod
    def forward(ctx: Any, hidden_KTD: Tensor, loss: Tensor, grad_KTD: Tensor) -> Tensor:
        ctx.save_for_backward(grad_KTD)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad_KTD,) = ctx.saved_tensors
        return grad_KTD * grad_loss, None, None


def _loss_and_grad(
    draft_hidden_KTD: Tensor,
    weights_KT: Tensor,
    chunks: list[Tensor],
    teacher: _TeacherChunks,
    logits: ChunkLogits,
    with_grad: bool,
) -> tuple[DraftLoss, Tensor | None]:
    """The loop over chunks, and over the drafts within each. The gradient is for an incoming gradient of 1."""
    counts_KT = weights_KT != 0
    weights_KT = weights_KT.to(logits.dtype)
    loss_KT, accept_prob_KT = torch.zeros_like(weights_KT), torch.zeros_like(weights_KT)
    top1_KT, argmax_KT = torch.zeros_like(counts_KT), torch.full_like(counts_KT, -1, dtype=torch.int64)
    grad_KTD = torch.zeros_like(draft_hidden_KTD) if with_grad else None
    buffer = logits.buffer()
    for positions_c in chunks:
        targets = teacher.targets(positions_c)
        for k in range(len(weights_KT)):
            here = (k, positions_c)
            # 0 in place of what does not count: it may be NaN, which a weight of 0 would keep.
            hidden_cD = draft_hidden_KTD[here].masked_fill_(~counts_KT[here][:, None], 0)
            draft_cv = logits.write(hidden_cD, buffer)
            loss_KT[here], accept_prob_KT[here], argmax_c = _compare_(draft_cv, targets, logits.shard)
            top1_KT[here], argmax_KT[here] = argmax_c == targets.teacher_argmax_c, argmax_c.long()
            if grad_KTD is not None:
                dlogits_cv = logits.operand(draft_cv.sub_(targets.target_cv))
                grad_cD = torch.mm(dlogits_cv, logits.shard.weight_vD)
                # After the product, on few numbers: a weight may be 1e-6, which a short dtype is better without.
                grad_KTD[here] = (grad_cD * (weights_KT[here] / logits.temperature)[:, None]).to(grad_KTD.dtype)
    if grad_KTD is not None and logits.shard.group is not None:
        dist.all_reduce(grad_KTD, group=logits.shard.group)
    loss = (weights_KT * loss_KT).sum()
    argmax_KT.masked_fill_(~counts_KT, -1)
    return DraftLoss(loss, loss_KT * counts_KT, accept_prob_KT * counts_KT, top1_KT & counts_KT, argmax_KT), grad_KTD


class _ChunkTargets(NamedTuple):
    """What the drafts of a chunk are compared with: the target of the CE, and the full teacher for the metrics."""

    target_cv: Tensor
    teacher_cv: Tensor
    teacher_argmax_c: Tensor


def _compare_(draft_cv: Tensor, targets: _ChunkTargets, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """CE, acceptance probability and argmax id; overwrites the logits with their softmax. One collective.

    ``CE(p, q) = lse(logits) - sum_v p_v logits_v``
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


class _TeacherChunks:
    """The policy's distribution over a chunk, and what the loss type makes of it."""

    def __init__(
        self, hidden_TD: Tensor, logits: ChunkLogits, loss_type: str, topk: int, labels_T: Tensor | None
    ) -> None:
        self.hidden_TD, self.logits, self.loss_type = hidden_TD, logits, loss_type
        self.topk, self.labels_T = topk, labels_T
        self.buffer = logits.buffer()
        self.target_buffer = self.buffer if loss_type == "soft_ce" else logits.buffer()

    def targets(self, positions_c: Tensor) -> _ChunkTargets:
        """For the positions, until the next call. One collective; three for ``topk_soft_ce``."""
        shard = self.logits.shard
        teacher_cv = self.logits.write(self.hidden_TD[positions_c], self.buffer)
        target_cv = self.target_buffer[: len(positions_c)]
        if self.loss_type == "topk_soft_ce":
            _mask_below_topk_(target_cv.copy_(teacher_cv), self.topk, shard)
            softmax_(target_cv, shard)
        elif self.labels_T is not None and self.loss_type == "hard_ce":
            column_c, mine_c = shard.to_local(self.labels_T[positions_c])
            target_cv.zero_().scatter_(1, column_c[:, None], mine_c[:, None].to(target_cv.dtype))
        # For soft_ce, teacher and target are one tensor.
        return _ChunkTargets(target_cv, teacher_cv, softmax_(teacher_cv, shard))


def _mask_below_topk_(logits_cv: Tensor, topk: int, shard: VocabShard) -> None:
    """Takes the logits below the ``topk``-th largest of all ranks out of the softmax. One collective."""
    lowest = torch.finfo(logits_cv.dtype).min
    candidates_cn = logits_cv.new_full((len(logits_cv), topk), lowest)
    num_local = min(topk, logits_cv.shape[1])
    candidates_cn[:, :num_local] = logits_cv.topk(num_local, sorted=False).values
    (candidates_Rcn,) = all_gather_columns([candidates_cn], shard.group)
    threshold_c = candidates_Rcn.transpose(0, 1).flatten(1).topk(topk).values[:, -1]
    logits_cv.masked_fill_(logits_cv < threshold_c[:, None], lowest)
