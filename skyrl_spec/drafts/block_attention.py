"""Attention of DFlash blocks over the document before their anchor and over their own slots. Two kernels.

On a GPU, FlexAttention visits only the tiles of keys that a tile of slots can see. On a CPU, SDPA runs on a few blocks
of one document at a time. Neither makes a mask or scores of all slots and all tokens.

Shapes: T tokens of the pack, Q slots, H heads, G key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from skyrl_spec.drafts.blocks import Blocks
from skyrl_spec.models.upload import upload


class Keys(NamedTuple):
    """Keys and values of the tokens, and those of the slots."""

    token_key_TGd: Tensor
    token_value_TGd: Tensor
    slot_key_QGd: Tensor
    slot_value_QGd: Tensor


# (query [Q, H, d], keys, scale) -> [Q, H, d]
BlockAttention = Callable[[Tensor, Keys, float], Tensor]

# Slots that SDPA computes at a time, and tokens up to which it keeps their masks for the backward pass.
SLOTS_AT_A_TIME = 512
MAX_KEPT_TOKENS = 2048
# Slots and keys of a tile of FlexAttention.
TILE = 128


def block_attention(blocks: Blocks, num_tokens: int) -> BlockAttention:
    """Attention of ``blocks`` of a pack with this many tokens. All layers share it."""
    return (flex_block_attention if blocks.anchor_A.is_cuda else sdpa_block_attention)(blocks, num_tokens)


# ---- SDPA -----------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Consecutive blocks of one document, and the range of tokens that any of them sees."""

    first_block: int
    num_blocks: int
    start: int
    end: int


def sdpa_block_attention(blocks: Blocks, _num_tokens: int) -> BlockAttention:
    """``block_attention`` by SDPA, with a dense mask for at most ``SLOTS_AT_A_TIME`` slots."""
    spans = _spans(blocks)
    slots = [span.num_blocks * blocks.num_slots for span in spans]

    def attend(query_QHd: Tensor, keys: Keys, scale: float) -> Tensor:
        of_slots = (x.split(slots) for x in (query_QHd, keys.slot_key_QGd, keys.slot_value_QGd))
        outputs = []
        for span, query, slot_key, slot_value in zip(spans, *of_slots, strict=True):
            tokens = slice(span.start, span.end)
            some = Keys(keys.token_key_TGd[tokens], keys.token_value_TGd[tokens], slot_key, slot_value)
            outputs.append(_attend_from_span(blocks, span, query, some, scale))
        return torch.cat(outputs, dim=1).transpose(0, 1)

    return attend


def _attend_from_span(blocks: Blocks, span: _Span, query_QHd: Tensor, keys: Keys, scale: float) -> Tensor:
    """``[H, Q, d]``. Masks of many tokens are not kept for the backward pass, but made again."""
    if span.end - span.start <= MAX_KEPT_TOKENS:
        return _attend_masked(blocks, span, query_QHd, *keys, scale)
    return checkpoint(
        _attend_masked, blocks, span, query_QHd, *keys, scale, use_reentrant=False, preserve_rng_state=False
    )


def _attend_masked(
    blocks: Blocks,
    span: _Span,
    query_QHd: Tensor,
    token_key: Tensor,
    token_value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    scale: float,
) -> Tensor:
    key, value = torch.cat([token_key, slot_key]), torch.cat([token_value, slot_value])
    # No kernel that avoids the scores takes both a mask and shared keys.
    key, value = (x.repeat_interleave(query_QHd.shape[1] // x.shape[1], dim=1) for x in (key, value))
    query, key, value = (x.transpose(0, 1)[None] for x in (query_QHd, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_mask(blocks, span), scale=scale)[0]


def _spans(blocks: Blocks) -> list[_Span]:
    spans, at_a_time = [], max(SLOTS_AT_A_TIME // blocks.num_slots, 1)
    for start, group in groupby(range(len(blocks.anchors)), lambda block: blocks.starts[block]):
        numbers = list(group)
        for first in range(0, len(numbers), at_a_time):
            some = numbers[first : first + at_a_time]
            spans.append(_Span(some[0], len(some), start, blocks.anchors[some[-1]]))
    return spans


def _mask(blocks: Blocks, span: _Span) -> Tensor:
    """Rows of ``blocks.visible`` for the slots of a span, without the columns that none of them sees."""
    anchor_Q1 = blocks.anchor_A[span.first_block :][: span.num_blocks].repeat_interleave(blocks.num_slots)[:, None]
    before_QN = torch.arange(span.start, span.end) < anchor_Q1
    block_Q = torch.arange(len(anchor_Q1)) // blocks.num_slots
    return torch.cat([before_QN, block_Q[:, None] == block_Q], dim=1)


# ---- FlexAttention --------------------------------------------------------------------------------------------------


def flex_block_attention(blocks: Blocks, num_tokens: int) -> BlockAttention:
    """``block_attention`` by FlexAttention: compiled on a GPU, eager on a CPU."""
    mask = _tiled_mask(blocks, num_tokens)

    def attend(query_QHd: Tensor, keys: Keys, scale: float) -> Tensor:
        key = torch.cat([keys.token_key_TGd, keys.slot_key_QGd])
        value = torch.cat([keys.token_value_TGd, keys.slot_value_QGd])
        query, key, value = (x.transpose(0, 1)[None] for x in (query_QHd, key, value))
        kernel = _compiled_flex_attention() if query.is_cuda else flex_attention
        out = kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=_KERNEL)
        return out[0].transpose(0, 1)

    return attend


def _tiled_mask(blocks: Blocks, num_tokens: int) -> BlockMask:
    """FlexAttention's mask, whose tiles are found on the host. A mask built on the device would be ``[Q, T + Q]``."""
    device, num_slots = blocks.anchor_A.device, len(blocks.anchors) * blocks.num_slots
    partial_tiles, full_tiles = _tiles(blocks, num_tokens)
    tables = tuple(torch.from_numpy(table)[None, None] for tiles in (partial_tiles, full_tiles) for table in tiles)
    num_partial, partial_index, num_full, full_index = upload(tables, device)
    return BlockMask.from_kv_blocks(
        num_partial,
        partial_index,
        num_full,
        full_index,
        BLOCK_SIZE=TILE,
        mask_mod=_visible_mod(blocks, num_tokens),
        seq_lengths=(num_slots, num_tokens + num_slots),
    )


def _tiles(blocks: Blocks, num_tokens: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Tiles of keys for each tile of slots: those it sees in part, and those that all its slots see whole.

    Each as their number ``[tiles of slots]`` and their indices ``[tiles of slots, tiles of keys]``, int32.
    """
    num_slots = len(blocks.anchors) * blocks.num_slots
    anchors_Q, starts_Q = (np.repeat(np.asarray(x), blocks.num_slots) for x in (blocks.anchors, blocks.starts))
    block_Q = np.arange(num_slots) // blocks.num_slots
    edges = np.arange(0, num_slots, TILE)
    lowest, highest = (partial(ufunc.reduceat, indices=edges) for ufunc in (np.minimum, np.maximum))
    num_key_tiles = -(-(num_tokens + num_slots) // TILE)
    tile_K = np.arange(num_key_tiles)
    first_key_K, last_key_K = tile_K * TILE, np.minimum((tile_K + 1) * TILE, num_tokens + num_slots) - 1
    # Tokens from the first start to the last anchor are seen by some slot, from the last start to the first by all.
    seen = (first_key_K < highest(anchors_Q)[:, None]) & (last_key_K >= lowest(starts_Q)[:, None])
    whole = (first_key_K >= highest(starts_Q)[:, None]) & (last_key_K < lowest(anchors_Q)[:, None])
    own_first = num_tokens + lowest(block_Q)[:, None] * blocks.num_slots
    own_last = num_tokens + (highest(block_Q)[:, None] + 1) * blocks.num_slots - 1
    own = (first_key_K <= own_last) & (last_key_K >= own_first)
    return _table((seen & ~whole) | own), _table(whole & ~own)


def _table(is_listed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of True entries of each row, and their columns first."""
    return is_listed.sum(axis=1).astype(np.int32), np.argsort(~is_listed, axis=1, kind="stable").astype(np.int32)


def _visible_mod(blocks: Blocks, num_tokens: int):  # type: ignore[no-untyped-def]
    """``blocks.visible`` as FlexAttention's mask function of (batch, head, slot, key)."""
    num_slots = blocks.num_slots
    anchor_Q, start_Q = (x.repeat_interleave(num_slots) for x in (blocks.anchor_A, blocks.start_A))

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        before = (start_Q[q] <= k) & (k < anchor_Q[q])
        return torch.where(k < num_tokens, before, (k - num_tokens) // num_slots == q // num_slots)

    return mod


# For fewer than 128 queries, torch chooses a kernel for decoding. torch 2.11 cannot compile it for lengths that change.
_KERNEL: Any = {"FORCE_USE_FLEX_ATTENTION": True}


@cache
def _compiled_flex_attention() -> Any:
    # Packs differ in length.
    return torch.compile(flex_attention, dynamic=True)
