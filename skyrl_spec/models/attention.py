"""Core attention for Megatron's local layer spec, on PyTorch's scaled_dot_product_attention.

Megatron's own local core attention keeps a ``[B, H, S, S]`` tensor of probabilities per layer. This one runs the
device's flash kernel. Shapes follow Megatron: S sequence, B batch, H query heads, G key heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class SdpaAttention(nn.Module):
    """Causal attention.

    ``attention_mask`` None means one document per row. Else it is bool ``[B, 1, S, S]``, True where attention is
    barred, and keeps the documents of a row apart (``policy.document_mask``).
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any):
        # Megatron also passes mask type, dropout and process groups, which have one value here.
        super().__init__()
        self.scale = config.softmax_scale or config.kv_channels**-0.5
        self.layer_number = layer_number

    def forward(
        self, query_SBHd: Tensor, key_SBGd: Tensor, value_SBGd: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """``[S, B, H*d]``."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHd, key_SBGd, value_SBGd))
        shares_keys = query.shape[1] != key.shape[1]
        if shares_keys and attention_mask is not None:
            # No kernel that avoids the [S, S] scores takes both a mask and shared keys.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        out_BHSd = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            scale=self.scale,
            enable_gqa=shares_keys and attention_mask is None,
        )
        return out_BHSd.permute(2, 0, 1, 3).flatten(2)
