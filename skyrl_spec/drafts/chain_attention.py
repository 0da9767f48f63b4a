"""Attention of an MTP head that is unrolled on its own output, as in vLLM.

vLLM caches the head's depth-1 keys of every position. A chain with base t writes its next keys to the slots t+1, t+2, …
of that cache, over the depth-1 keys there. The query of depth d therefore sees the depth-1 keys of positions <= t, the
keys of its own chain (depths 2 to d), and nothing else. All depths share the depth-1 keys, so the cost is linear in
depth. Rolling the sequence instead computes another function, over all keys of all depths.

Shapes follow Megatron: S sequence, B batch, H query heads, G key heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skyrl_spec.models.attention import SdpaAttention

# Queries whose scores exist at a time. Longer rows are computed in blocks, and again in the backward pass.
QUERY_BLOCK = 1024


class ChainAttention(SdpaAttention):
    """Attention whose first call after ``reset`` is depth 1 (causal) and whose next calls are the next depths.

    It keeps the keys and values of all depths of a micro-batch.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def reset(self) -> None:
        """Drops all keys and values. Call it before depth 1 and after the last depth."""
        self._keys, self._values = [], []

    def forward(
        self, query_SBHd: Tensor, key_SBGd: Tensor, value_SBGd: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """``[S, B, H*d]``."""
        self._keys.append(key_SBGd)
        self._values.append(value_SBGd)
        if len(self._keys) == 1:
            return super().forward(query_SBHd, key_SBGd, value_SBGd, attention_mask, **kwargs)
        return chain_attention(query_SBHd, self._keys, self._values, attention_mask, self.scale)


def chain_attention(
    query_SBHd: Tensor, keys: list[Tensor], values: list[Tensor], barred_B1SS: Tensor | None, scale: float
) -> Tensor:
    """Attention of depth ``len(keys)`` (at least 2), ``[S, B, H*d]``.

    Args:
        keys: keys of every depth, ``[S, B, G, d]`` each; those of depth d at index t belong to base t.
        values: values, likewise.
        barred_B1SS: True where depth-1 attention is barred; None: causal.
    """
    seq_len, batch, num_heads, head_dim = query_SBHd.shape
    num_groups = keys[0].shape[2]
    query_BGRSd = query_SBHd.permute(1, 2, 0, 3).reshape(batch, num_groups, -1, seq_len, head_dim) * scale
    first_key, first_value = (x[0].permute(1, 2, 0, 3)[:, :, None] for x in (keys, values))
    chain_key, chain_value = (torch.stack(x[1:]).permute(2, 3, 1, 0, 4)[:, :, None] for x in (keys, values))
    blocks = []
    for start in range(0, seq_len, QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        inputs = (
            query_BGRSd[..., rows, :],
            first_key,
            first_value,
            chain_key[..., rows, :, :],
            chain_value[..., rows, :, :],
            _barred_rows(barred_B1SS, rows, seq_len, query_SBHd.device),
        )
        if seq_len <= QUERY_BLOCK:
            blocks.append(_attend(*inputs))
        else:
            blocks.append(checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False))
    out_BHSd = torch.cat(blocks, dim=3).reshape(batch, num_heads, seq_len, head_dim)
    return out_BHSd.permute(2, 0, 1, 3).flatten(2)


def _barred_rows(barred_B1SS: Tensor | None, rows: slice, seq_len: int, device: torch.device) -> Tensor:
    """True where attention is barred, broadcastable to ``[B, G, R, s, S]``."""
    if barred_B1SS is not None:
        return barred_B1SS[:, :, None, rows]
    index_S = torch.arange(seq_len, device=device)
    return index_S[None, :] > index_S[rows, None]


def _attend(
    query: Tensor, first_key: Tensor, first_value: Tensor, chain_key: Tensor, chain_value: Tensor, barred: Tensor
) -> Tensor:
    """Attention of one block of queries over the depth-1 keys and its chains.

    ``query`` is ``[B, G, R, s, d]``, ``first_*`` ``[B, G, 1, S, d]``, and ``chain_*`` ``[B, G, 1, s, E, d]`` holds the
    depths 2 to E+1.
    """
    first_scores = (query @ first_key.transpose(-1, -2)).float().masked_fill(barred, -torch.inf)
    chain_scores = (chain_key @ query[..., None]).squeeze(-1).float()
    probs = torch.softmax(torch.cat([first_scores, chain_scores], dim=-1), dim=-1).to(query.dtype)
    first_probs, chain_probs = probs.split([first_key.shape[-2], chain_key.shape[-2]], dim=-1)
    return first_probs @ first_value + (chain_probs[..., None, :] @ chain_value).squeeze(-2)
