"""Attention of an MTP head that is unrolled on its own output, as in vLLM.

vLLM caches the head's depth-1 keys of every position. A chain with base t writes its next keys to the slots t+1, t+2, …
of that cache, over the depth-1 keys there. The query of depth d therefore sees the depth-1 keys of positions <= t, the
keys of its own chain (depths 2 to d), and nothing else. All depths share the depth-1 keys, so the cost is linear in
depth. Rolling the sequence instead computes another function, over all keys of all depths.

The flash kernel of ``models.flash`` attends to the depth-1 keys. The few keys of the chain are merged into its softmax
by the log-sum-exp. Memory is linear in tokens: no tensor of scores is larger than ``[Q, H, depth - 1]``.

Chains may begin at the last tokens of each document only. All its tokens have depth-1 keys.

Shapes: T tokens of a pack, Q chains, H query heads, G key heads, R = H / G, d head size, E = depth - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.autograd.function import once_differentiable

from skyrl_spec.models import flash
from skyrl_spec.models.attention import DocumentAttention
from skyrl_spec.models.flash import Attended, Documents, suffix_attention


class ChainKeys(PackedSeqParams):
    """Keys of the chains of a pack, which travel through Megatron's layers to ``ChainAttention``.

    The first call attends to the depth-1 keys, which are known before it. Each next call adds its own keys.
    """

    def __init__(self, key_TGd: Tensor, value_TGd: Tensor, documents: Documents, queries: Documents):
        # Any other format makes Megatron reshape the pack.
        super().__init__(qkv_format="sbhd")
        self.keys, self.values = [key_TGd], [value_TGd]
        self.documents, self.queries = documents, queries
        self._is_begun = False

    def add(self, key_QGd: Tensor, value_QGd: Tensor) -> None:
        """Takes the keys of the queries of this depth. Those of depth 1 are known."""
        if self._is_begun:
            self.keys.append(key_QGd)
            self.values.append(value_QGd)
        self._is_begun = True


class ChainAttention(DocumentAttention):
    """Attention of one depth after the other, from depth 1."""

    def forward(
        self,
        query_Q1Hd: Tensor,
        key_Q1Gd: Tensor,
        value_Q1Gd: Tensor,
        attention_mask: None,
        /,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """``[Q, 1, H*d]``."""
        chains = packed_seq_params
        assert isinstance(chains, ChainKeys)
        chains.add(key_Q1Gd[:, 0], value_Q1Gd[:, 0])
        out_QHd = chain_attention(
            query_Q1Hd[:, 0], chains.keys, chains.values, chains.documents, self.scale, chains.queries
        )
        return out_QHd.flatten(1)[:, None]


def chain_attention(
    query_QHd: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    documents: Documents,
    scale: float,
    queries: Documents | None = None,
) -> Tensor:
    """Attention of depth ``len(keys)``, ``[Q, H, d]``.

    Args:
        keys: keys of every depth. Those of depth 1, ``[T, G, d]``, belong to the tokens of the documents, those of
            deeper ones, ``[Q, G, d]``, to the chains, whose base is the token of the query.
        values: values, likewise.
        queries: documents of the queries, the last tokens of each document. None: all tokens.
    """
    queries = queries or documents
    if len(keys) == 1:
        return suffix_attention(query_QHd, keys[0], values[0], documents, scale, queries)
    own_keys, own_values = torch.stack(keys[1:]), torch.stack(values[1:])
    return _ChainAttention.apply(query_QHd, keys[0], values[0], own_keys, own_values, documents, scale, queries)


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QHd: Tensor,
        key_TGd: Tensor,
        value_TGd: Tensor,
        own_key_EQGd: Tensor,
        own_value_EQGd: Tensor,
        documents: Documents,
        scale: float,
        queries: Documents,
    ) -> Tensor:
        first = flash.forward(query_QHd, key_TGd, value_TGd, documents, scale, queries)
        scores_EQH = _own_scores(query_QHd, own_key_EQGd, scale)
        lse_QH = torch.logaddexp(first.lse_HT.t(), scores_EQH.logsumexp(0))
        own_probs_EQH = (scores_EQH - lse_QH).exp()
        of_first_QH = (first.lse_HT.t() - lse_QH).exp()
        out_QHd = of_first_QH[..., None] * first.out_THd + _own_output(own_probs_EQH, own_value_EQGd)
        out_QHd = out_QHd.to(query_QHd.dtype)
        lse_HQ = lse_QH.t().contiguous()
        ctx.save_for_backward(query_QHd, key_TGd, value_TGd, own_key_EQGd, own_value_EQGd, out_QHd, lse_HQ)
        ctx.documents, ctx.scale, ctx.queries = documents, scale, queries
        return out_QHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHd: Tensor) -> tuple[Tensor | None, ...]:
        query_QHd, key_TGd, value_TGd, own_key_EQGd, own_value_EQGd, out_QHd, lse_HQ = ctx.saved_tensors
        merged = Attended(out_QHd, lse_HQ)
        query_grad, key_grad, value_grad = flash.backward(
            grad_QHd, query_QHd, key_TGd, value_TGd, merged, ctx.documents, ctx.scale, ctx.queries
        )
        probs_EQH = (_own_scores(query_QHd, own_key_EQGd, ctx.scale) - lse_HQ.t()).exp()
        wide = probs_EQH.dtype
        # Softmax: the gradient of a score is its probability times what its value adds to the output's share of grad.
        mean_QH = (grad_QHd.to(wide) * out_QHd.to(wide)).sum(-1)
        grad_scores_EQH = probs_EQH * (_own_dot(grad_QHd, own_value_EQGd, wide) - mean_QH) * ctx.scale
        query_grad = query_grad + _own_output(grad_scores_EQH, own_key_EQGd).to(query_grad.dtype)
        own_key_grad = _to_own(grad_scores_EQH, query_QHd, own_key_EQGd)
        own_value_grad = _to_own(probs_EQH, grad_QHd, own_value_EQGd)
        return query_grad, key_grad, value_grad, own_key_grad, own_value_grad, None, None, None


def _own_scores(query_QHd: Tensor, own_key_EQGd: Tensor, scale: float) -> Tensor:
    """Scaled scores of a query and the keys of its own chain, ``[E, Q, H]``, at least float32."""
    wide = torch.float64 if query_QHd.dtype == torch.float64 else torch.float32
    return _own_dot(query_QHd, own_key_EQGd, wide) * scale


def _own_dot(x_QHd: Tensor, own_EQGd: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of every head with its own key or value of each depth, ``[E, Q, H]``."""
    x_QGRd = _grouped(x_QHd, own_EQGd).to(dtype)
    return torch.stack([(x_QGRd * own_QGd.to(dtype)[:, :, None]).sum(-1).flatten(1) for own_QGd in own_EQGd])


def _own_output(factor_EQH: Tensor, own_EQGd: Tensor) -> Tensor:
    """Sum over depths of factor times own key or value, ``[Q, H, d]``."""
    num_tokens, num_groups, head_dim = own_EQGd.shape[1:]
    out_QGRd = factor_EQH.new_zeros(num_tokens, num_groups, factor_EQH.shape[2] // num_groups, head_dim)
    for factor_QH, own_QGd in zip(factor_EQH, own_EQGd, strict=True):
        out_QGRd.addcmul_(factor_QH.view(num_tokens, num_groups, -1, 1), own_QGd.to(out_QGRd.dtype)[:, :, None])
    return out_QGRd.flatten(1, 2)


def _to_own(factor_EQH: Tensor, x_QHd: Tensor, own_EQGd: Tensor) -> Tensor:
    """Sum over the heads of a group of factor times ``x``, ``[E, Q, G, d]`` in the dtype of ``own``."""
    x_QGRd = _grouped(x_QHd, own_EQGd).to(factor_EQH.dtype)
    parts = [(factor_QH.view(*x_QGRd.shape[:3], 1) * x_QGRd).sum(2) for factor_QH in factor_EQH]
    return torch.stack(parts).to(own_EQGd.dtype)


def _grouped(x_QHd: Tensor, own_EQGd: Tensor) -> Tensor:
    return x_QHd.unflatten(1, (own_EQGd.shape[2], -1))
