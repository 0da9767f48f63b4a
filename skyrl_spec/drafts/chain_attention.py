"""Attention of an MTP head that is unrolled on its own output, as in vLLM.

vLLM caches the head's depth-1 keys of every position. A chain with base t writes its next keys to the slots t+1, t+2, …
of that cache, over the depth-1 keys there. The query of depth d therefore sees the depth-1 keys of positions <= t, the
keys of its own chain (depths 2 to d), and nothing else. All depths share the depth-1 keys, so the cost is linear in
depth. Rolling the sequence instead computes another function, over all keys of all depths.

The flash kernel of ``models.flash`` attends to the depth-1 keys. The few keys of the chain are merged into its softmax
by the log-sum-exp. Memory is linear in tokens: no tensor of scores is larger than ``[T, H, depth - 1]``.

Shapes: T tokens of a pack, H query heads, G key heads, R = H / G, d head size, E = depth - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skyrl_spec.models import flash
from skyrl_spec.models.attention import DocumentAttention
from skyrl_spec.models.flash import Attended, Documents, documents_attention


class ChainAttention(DocumentAttention):
    """Attention whose first call after ``reset`` is depth 1 (causal) and whose next calls are the next depths.

    It keeps the keys and values of all depths of a pack.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reset(None)

    def reset(self, documents: Documents | None) -> None:
        """Drops all keys and values. Call it with the documents before depth 1, and with None after the last depth."""
        self._documents = documents
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def forward(
        self, query_T1Hd: Tensor, key_T1Gd: Tensor, value_T1Gd: Tensor, attention_mask: None, **_: Any
    ) -> Tensor:
        """``[T, 1, H*d]``."""
        assert self._documents is not None
        self._keys.append(key_T1Gd[:, 0])
        self._values.append(value_T1Gd[:, 0])
        out_THd = chain_attention(query_T1Hd[:, 0], self._keys, self._values, self._documents, self.scale)
        return out_THd.flatten(1)[:, None]


def chain_attention(
    query_THd: Tensor, keys: list[Tensor], values: list[Tensor], documents: Documents, scale: float
) -> Tensor:
    """Attention of depth ``len(keys)``, ``[T, H, d]``.

    Args:
        keys: keys of every depth, ``[T, G, d]`` each; those of depth d at index t belong to base t.
        values: values, likewise.
    """
    if len(keys) == 1:
        return documents_attention(query_THd, keys[0], values[0], documents, scale)
    own_keys, own_values = torch.stack(keys[1:]), torch.stack(values[1:])
    return _ChainAttention.apply(query_THd, keys[0], values[0], own_keys, own_values, documents, scale)


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_THd: Tensor,
        key_TGd: Tensor,
        value_TGd: Tensor,
        own_key_ETGd: Tensor,
        own_value_ETGd: Tensor,
        documents: Documents,
        scale: float,
    ) -> Tensor:
        first = flash.forward(query_THd, key_TGd, value_TGd, documents, scale)
        scores_ETH = _own_scores(query_THd, own_key_ETGd, scale)
        lse_TH = torch.logaddexp(first.lse_HT.t(), scores_ETH.logsumexp(0))
        own_probs_ETH = (scores_ETH - lse_TH).exp()
        of_first_TH = (first.lse_HT.t() - lse_TH).exp()
        out_THd = of_first_TH[..., None] * first.out_THd + _own_output(own_probs_ETH, own_value_ETGd)
        out_THd = out_THd.to(query_THd.dtype)
        lse_HT = lse_TH.t().contiguous()
        ctx.save_for_backward(query_THd, key_TGd, value_TGd, own_key_ETGd, own_value_ETGd, out_THd, lse_HT)
        ctx.documents, ctx.scale = documents, scale
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        query_THd, key_TGd, value_TGd, own_key_ETGd, own_value_ETGd, out_THd, lse_HT = ctx.saved_tensors
        merged = Attended(out_THd, lse_HT)
        query_grad, key_grad, value_grad = flash.backward(
            grad_THd, query_THd, key_TGd, value_TGd, merged, ctx.documents, ctx.scale
        )
        probs_ETH = (_own_scores(query_THd, own_key_ETGd, ctx.scale) - lse_HT.t()).exp()
        wide = probs_ETH.dtype
        # Softmax: the gradient of a score is its probability times what its value adds to the output's share of grad.
        mean_TH = (grad_THd.to(wide) * out_THd.to(wide)).sum(-1)
        grad_scores_ETH = probs_ETH * (_own_dot(grad_THd, own_value_ETGd, wide) - mean_TH) * ctx.scale
        query_grad = query_grad + _own_output(grad_scores_ETH, own_key_ETGd).to(query_grad.dtype)
        own_key_grad = _to_own(grad_scores_ETH, query_THd, own_key_ETGd)
        own_value_grad = _to_own(probs_ETH, grad_THd, own_value_ETGd)
        return query_grad, key_grad, value_grad, own_key_grad, own_value_grad, None, None


def _own_scores(query_THd: Tensor, own_key_ETGd: Tensor, scale: float) -> Tensor:
    """Scaled scores of a query and the keys of its own chain, ``[E, T, H]``, at least float32."""
    wide = torch.float64 if query_THd.dtype == torch.float64 else torch.float32
    return _own_dot(query_THd, own_key_ETGd, wide) * scale


def _own_dot(x_THd: Tensor, own_ETGd: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of every head with its own key or value of each depth, ``[E, T, H]``."""
    x_TGRd = _grouped(x_THd, own_ETGd).to(dtype)
    return torch.stack([(x_TGRd * own_TGd.to(dtype)[:, :, None]).sum(-1).flatten(1) for own_TGd in own_ETGd])


def _own_output(factor_ETH: Tensor, own_ETGd: Tensor) -> Tensor:
    """Sum over depths of factor times own key or value, ``[T, H, d]``."""
    num_tokens, num_groups, head_dim = own_ETGd.shape[1:]
    out_TGRd = factor_ETH.new_zeros(num_tokens, num_groups, factor_ETH.shape[2] // num_groups, head_dim)
    for factor_TH, own_TGd in zip(factor_ETH, own_ETGd, strict=True):
        out_TGRd.addcmul_(factor_TH.view(num_tokens, num_groups, -1, 1), own_TGd.to(out_TGRd.dtype)[:, :, None])
    return out_TGRd.flatten(1, 2)


def _to_own(factor_ETH: Tensor, x_THd: Tensor, own_ETGd: Tensor) -> Tensor:
    """Sum over the heads of a group of factor times ``x``, ``[E, T, G, d]`` in the dtype of ``own``."""
    x_TGRd = _grouped(x_THd, own_ETGd).to(factor_ETH.dtype)
    parts = [(factor_TH.view(*x_TGRd.shape[:3], 1) * x_TGRd).sum(2) for factor_TH in factor_ETH]
    return torch.stack(parts).to(own_ETGd.dtype)


def _grouped(x_THd: Tensor, own_ETGd: Tensor) -> Tensor:
    return x_THd.unflatten(1, (own_ETGd.shape[2], -1))
