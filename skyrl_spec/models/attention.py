"""Core attention for Megatron's local layer spec, on PyTorch's scaled_dot_product_attention.

Megatron's own local core attention keeps a ``[B, H, S, S]`` probability tensor a layer; this one runs the flash kernel
of the device. Shapes follow Megatron: S sequence, B batch, H heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class SdpaAttention(nn.Module):
    """Causal attention; documents packed into a row are kept apart by ``attention_mask``.

    ``attention_mask`` is None (one document a row: causal) or bool ``[B, 1, S, S]``, True where attention is barred.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any):
        # The other arguments Megatron passes (mask type, dropout, process groups) have one value here.
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
            # With a mask *and* shared keys no kernel is left that does without the [S, S] scores.
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
