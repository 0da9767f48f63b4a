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

from collections.abc import Callable
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
    exp_minus_max_,
    nonzero_chunks,
    row_dot,
    softmax_,
    vocab_shard,
)


class DraftLoss(NamedTuple):
    """The loss and, for every draft and target position, what it is made of; 0 (False) where the weight is 0.

    ``accept_prob_KT`` is the teacher's probability of the draft's argmax token: the probability with which exact
    rejection sampling accepts a greedily drafted token.
    """

    loss: Tensor  # scalar, differentiable
    loss_KT: Tensor  # detached CE, before weighting
    accept_prob_KT: Tensor  # detached
    top1_KT: Tensor  # bool: draft argmax == teacher argmax


class _Chunk(NamedTuple):
    """What the drafts of a chunk are compared with: the target of the CE, and the full teacher for the metrics."""

    teacher_cv: Tensor
    teacher_argmax_c: Tensor
    target_cv: Tensor


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

    Raises:
        ValueError: an unknown loss type, or ``hard_ce`` without labels.
    """
    if loss_type not in _TARGETS:
        raise ValueError(f"loss_type={loss_type!r} is unknown; allowed are {', '.join(_TARGETS)}; set one of these")
    if loss_type == "hard_ce" and labels_T is None:
        raise ValueError("loss_type='hard_ce' needs labels_T; pass the target tokens or take another loss type")
    with_grad = torch.is_grad_enabled() and draft_hidden_KTD.requires_grad
    with torch.no_grad():
        shard = vocab_shard(output_weight_vD, vocab_size, group)
        run = _ChunkedLoss(shard, weights_KT, chunk_size, temperature, with_grad)
        result, grad_KTD = run(draft_hidden_KTD, teacher_hidden_TD, loss_type, topk, labels_T)
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


class _ChunkedLoss:
    """One evaluation: the loop over chunks, and over the drafts within each."""

    def __init__(
        self, shard: VocabShard, weights_KT: Tensor, chunk_size: int, temperature: float, with_grad: bool
    ) -> None:
        self.shard = shard
        self.weights_KT = weights_KT
        # Positions that no draft counts (prompts, padding) cost nothing.
        self.positions_chunks = nonzero_chunks(weights_KT.ne(0).any(0), chunk_size)
        self.temperature = temperature
        self.with_grad = with_grad
        self.logits = ChunkLogits(shard, min(chunk_size, weights_KT.shape[1]), temperature)

    def __call__(
        self,
        draft_hidden_KTD: Tensor,
        teacher_hidden_TD: Tensor,
        loss_type: str,
        topk: int,
        labels_T: Tensor | None,
    ) -> tuple[DraftLoss, Tensor | None]:
        dtype = compute_dtype(self.shard.weight_vD)
        loss_KT = torch.zeros_like(self.weights_KT, dtype=dtype)
        accept_prob_KT = torch.zeros_like(loss_KT)
        top1_KT = torch.zeros_like(loss_KT, dtype=torch.bool)
        grad_KTD = torch.zeros_like(draft_hidden_KTD) if self.with_grad else None
        teacher_buffer, draft_buffer = self.logits.buffer(), self.logits.buffer()
        target_buffer = teacher_buffer if loss_type == "soft_ce" else self.logits.buffer()

        for positions_c in self.positions_chunks:
            teacher_cv = self.logits.write(teacher_hidden_TD[positions_c], teacher_buffer)
            labels_c = None if labels_T is None else labels_T[positions_c]
            # Before the softmax: it overwrites the teacher's logits, which the target may be made from.
            target_cv = _TARGETS[loss_type](teacher_cv, target_buffer, self.shard, topk, labels_c)
            chunk = _Chunk(teacher_cv, softmax_(teacher_cv, self.shard), target_cv)
            for k, weights_T in enumerate(self.weights_KT):
                weights_c = weights_T[positions_c].to(dtype)
                counts_c = weights_c != 0
                # 0 in place of what does not count: it may be NaN, which a weight of 0 would keep.
                hidden_cD = draft_hidden_KTD[k, positions_c].masked_fill_(~counts_c[:, None], 0)
                draft_cv = self.logits.write(hidden_cD, draft_buffer)
                loss_c, accept_prob_c, top1_c = self._compare_(draft_cv, chunk)
                loss_KT[k, positions_c] = loss_c * counts_c
                accept_prob_KT[k, positions_c] = accept_prob_c * counts_c
                top1_KT[k, positions_c] = top1_c & counts_c
                if grad_KTD is not None:
                    grad_KTD[k, positions_c] = self._grad_hidden(draft_cv, chunk, weights_c)
        if grad_KTD is not None and self.shard.group is not None:
            dist.all_reduce(grad_KTD, group=self.shard.group)
        loss = (self.weights_KT.to(dtype) * loss_KT).sum()
        return DraftLoss(loss, loss_KT, accept_prob_KT, top1_KT), grad_KTD

    def _compare_(self, draft_cv: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """CE, acceptance probability and top-1 agreement; overwrites the logits with their softmax. One collective.

        CE(p, q) = lse(logits) - sum_v p_v logits_v.
        """
        max_c, column_c = draft_cv.max(-1)
        accept_prob_c = chunk.teacher_cv.gather(1, column_c[:, None])[:, 0]
        dot_c = row_dot(chunk.target_cv, draft_cv)
        sum_c = exp_minus_max_(draft_cv, max_c)
        argmax_c = self.shard.to_global(column_c, max_c.dtype)
        max_Rc, sum_Rc, argmax_Rc, accept_prob_Rc, dot_Rc = all_gather_columns(
            [max_c, sum_c, argmax_c, accept_prob_c, dot_c], self.shard.group
        )
        normaliser = Normaliser.combine(max_Rc, sum_Rc)
        draft_cv.mul_(normaliser.share_Rc[self.shard.rank][:, None])
        return (
            normaliser.lse_c - dot_Rc.sum(0),
            normaliser.of_winner(accept_prob_Rc),
            normaliser.of_winner(argmax_Rc) == chunk.teacher_argmax_c,
        )

    def _grad_hidden(self, draft_cv: Tensor, chunk: _Chunk, weights_c: Tensor) -> Tensor:
        """This rank's part of d loss / d draft_hidden [c, D]; overwrites the draft's softmax."""
        dlogits_cv = self.logits.matmul_operand(draft_cv.sub_(chunk.target_cv))
        grad_cD = torch.mm(dlogits_cv, self.shard.weight_vD)
        # After the product, on few numbers: a weight may be 1e-6, which a short dtype is better without.
        return (grad_cD * (weights_c / self.temperature)[:, None]).to(grad_cD.dtype)


def _soft_target(logits_cv: Tensor, buffer_cv: Tensor, shard: VocabShard, topk: int, labels_c: Tensor | None) -> Tensor:
    # The teacher itself: the softmax that follows is taken in place.
    return logits_cv


def _topk_target(logits_cv: Tensor, buffer_cv: Tensor, shard: VocabShard, topk: int, labels_c: Tensor | None) -> Tensor:
    """The softmax of the logits that reach the ``topk``-th largest of all ranks. Two collectives."""
    target_cv = buffer_cv[: len(logits_cv)].copy_(logits_cv)
    lowest = torch.finfo(target_cv.dtype).min
    candidates_cn = target_cv.new_full((len(target_cv), topk), lowest)
    num_local = min(topk, target_cv.shape[1])
    candidates_cn[:, :num_local] = target_cv.topk(num_local, sorted=False).values
    gathered_Rcn = all_gather_columns([candidates_cn], shard.group)[0]
    threshold_c = gathered_Rcn.transpose(0, 1).flatten(1).topk(topk).values[:, -1]
    softmax_(target_cv.masked_fill_(target_cv < threshold_c[:, None], lowest), shard)
    return target_cv


def _hard_target(logits_cv: Tensor, buffer_cv: Tensor, shard: VocabShard, topk: int, labels_c: Tensor | None) -> Tensor:
    assert labels_c is not None
    column_c, mine_c = shard.to_local(labels_c)
    target_cv = buffer_cv[: len(logits_cv)].zero_()
    return target_cv.scatter_(1, column_c[:, None], mine_c[:, None].to(target_cv.dtype))


_TARGETS: dict[str, Callable[[Tensor, Tensor, VocabShard, int, Tensor | None], Tensor]] = {
    "soft_ce": _soft_target,
    "topk_soft_ce": _topk_target,
    "hard_ce": _hard_target,
}
