"""Attention of DFlash blocks over the sequence before their anchor and over their own slots. Two kernels.

On a GPU, FlexAttention skips masked parts, which is nearly everything between blocks. On a CPU, SDPA gets a dense mask.
Shapes: B batch, H heads, G key heads, Q slots, N keys (sequence, then slots), d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from skyrl_spec.drafts.blocks import Blocks, visible, visible_mod

# (query [B, H, Q, d], key [B, G, N, d], value [B, G, N, d], scale) -> [B, H, Q, d]
BlockAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def block_attention(blocks: Blocks, segment_ids_BS: Tensor) -> BlockAttention:
    """Attention of ``blocks``. All layers share its mask."""
    build = flex_block_attention if segment_ids_BS.is_cuda else sdpa_block_attention
    return build(blocks, segment_ids_BS)


def sdpa_block_attention(blocks: Blocks, segment_ids_BS: Tensor) -> BlockAttention:
    """``block_attention`` by SDPA with a dense mask."""
    mask_B1QN = visible(blocks, segment_ids_BS)

    def attend(query_BHQd: Tensor, key_BGNd: Tensor, value_BGNd: Tensor, scale: float) -> Tensor:
        heads_per_group = query_BHQd.shape[1] // key_BGNd.shape[1]
        # No kernel that avoids the [Q, N] scores takes both a mask and shared keys.
        key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key_BGNd, value_BGNd))
        return F.scaled_dot_product_attention(query_BHQd, key, value, attn_mask=mask_B1QN, scale=scale)

    return attend


def flex_block_attention(blocks: Blocks, segment_ids_BS: Tensor) -> BlockAttention:
    """``block_attention`` by FlexAttention: compiled on a GPU, eager on a CPU."""
    num_rows, num_slots = len(segment_ids_BS), blocks.anchor_BA.shape[1] * blocks.num_slots
    mask = create_block_mask(
        visible_mod(blocks, segment_ids_BS),
        num_rows,
        None,
        num_slots,
        segment_ids_BS.shape[1] + num_slots,
        device=str(segment_ids_BS.device),
    )

    def attend(query_BHQd: Tensor, key_BGNd: Tensor, value_BGNd: Tensor, scale: float) -> Tensor:
        kernel = _compiled_flex_attention() if query_BHQd.is_cuda else flex_attention
        return kernel(query_BHQd, key_BGNd, value_BGNd, block_mask=mask, scale=scale, enable_gqa=True)

    return attend


@cache
def _compiled_flex_attention() -> Any:
    # Micro-batches differ in length.
    return torch.compile(flex_attention, dynamic=True)
