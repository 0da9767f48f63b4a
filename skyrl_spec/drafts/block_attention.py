"""Attention of DFlash blocks over the document before their anchor and over their own slots. Two kernels.

On a GPU, FlexAttention visits only the tiles of keys that a tile of slots can see. On a CPU, a flash kernel runs on a
few blocks of one document at a time. Neither makes a mask or scores of all slots and all tokens.

Shapes: T tokens of the pack, Q slots, H heads, G key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from skyrl_spec.drafts.blocks import Blocks
from skyrl_spec.models import flash
from skyrl_spec.models.flash import Attended
from skyrl_spec.models.upload import upload


class Keys(NamedTuple):
    """Keys and values of the tokens, and those of the slots."""

    token_key_TGd: Tensor
    token_value_TGd: Tensor
    slot_key_QGd: Tensor
    slot_value_QGd: Tensor


# (query [Q, H, d], keys, scale) -> [Q, H, d]
BlockAttention = Callable[[Tensor, Keys, float], Tensor]

# Blocks and tokens of the largest mask on a CPU.
BLOCKS_AT_A_TIME = 64
MAX_NEAR = 2048
# Slots and keys of a tile of FlexAttention.
TILE = 128


def block_attention(blocks: Blocks, num_tokens: int) -> BlockAttention:
    """Attention of ``blocks`` of a pack with this many tokens. All layers share it."""
    return (flex_block_attention if blocks.anchor_A.is_cuda else cpu_block_attention)(blocks, num_tokens)


# ---- Flash attention on a CPU ---------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Consecutive blocks of one document."""

    slots: slice
    # Tokens that all of the blocks see, and those that a part of them sees.
    before: slice
    near: slice
    anchor_Q: Tensor


def cpu_block_attention(blocks: Blocks, _num_tokens: int) -> BlockAttention:
    """``block_attention`` by the flash kernel: once over the slots of all blocks, and over the tokens span by span."""
    spans = _spans(blocks)

    def attend(query_QHd: Tensor, keys: Keys, scale: float) -> Tensor:
        return _SpansAttention.apply(query_QHd, *keys, spans, blocks.num_slots, scale)

    return attend


def _spans(blocks: Blocks) -> list[_Span]:
    spans, anchors = [], blocks.anchors
    for start, group in groupby(range(len(anchors)), lambda block: blocks.starts[block]):
        some = list(group)
        while some:
            first = some[0]
            fit = [block for block in some if anchors[block] - anchors[first] <= MAX_NEAR][:BLOCKS_AT_A_TIME]
            some, last = some[len(fit) :], fit[-1]
            # One kernel less where all tokens are near.
            begin = start if anchors[last] - start <= MAX_NEAR else anchors[first]
            spans.append(
                _Span(
                    slice(first * blocks.num_slots, (last + 1) * blocks.num_slots),
                    slice(start, begin),
                    slice(begin, anchors[last]),
                    blocks.anchor_A[first : last + 1].repeat_interleave(blocks.num_slots),
                )
            )
    return spans


class _SpansAttention(torch.autograd.Function):
    """Attention over two sets of keys, the tokens and the own slots, merged by the log-sum-exp of their scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query_QHd: Tensor,
        token_key_TGd: Tensor,
        token_value_TGd: Tensor,
        slot_key_QGd: Tensor,
        slot_value_QGd: Tensor,
        spans: list[_Span],
        num_slots: int,
        scale: float,
    ) -> Tensor:
        query_AsHd, key_AsGd, value_AsGd = _by_block((query_QHd, slot_key_QGd, slot_value_QGd), num_slots)
        own = flash.cpu_forward(query_AsHd, key_AsGd, value_AsGd, scale)
        lse_HQ = own.lse_HT.transpose(0, 1).flatten(1)
        attended = Attended(own.out_THd.flatten(0, 1), lse_HQ)
        before = Attended(torch.zeros_like(query_QHd), torch.full_like(lse_HQ, -torch.inf))
        for span in spans:
            of_span = _forward_of_span(query_QHd[span.slots], token_key_TGd, token_value_TGd, span, scale)
            if of_span is not None:
                before.out_THd[span.slots], before.lse_HT[:, span.slots] = of_span
        attended = flash.merged(attended, before)
        ctx.save_for_backward(query_QHd, token_key_TGd, token_value_TGd, slot_key_QGd, slot_value_QGd, *attended)
        ctx.spans, ctx.num_slots, ctx.scale = spans, num_slots, scale
        return attended.out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHd: Tensor) -> tuple[Tensor | None, ...]:
        query_QHd, token_key_TGd, token_value_TGd, slot_key_QGd, slot_value_QGd, out_QHd, lse_HQ = ctx.saved_tensors
        scale = ctx.scale
        grad_AsHd, query_AsHd, key_AsGd, value_AsGd, out_AsHd = _by_block(
            (grad_QHd, query_QHd, slot_key_QGd, slot_value_QGd, out_QHd), ctx.num_slots
        )
        lse_AHs = lse_HQ.unflatten(1, (-1, ctx.num_slots)).transpose(0, 1).contiguous()
        own_grads = flash.cpu_backward(grad_AsHd, query_AsHd, key_AsGd, value_AsGd, Attended(out_AsHd, lse_AHs), scale)
        query_grad, *slot_grads = (grad.flatten(0, 1) for grad in own_grads)
        key_grad, value_grad = torch.zeros_like(token_key_TGd), torch.zeros_like(token_value_TGd)
        for span in ctx.spans:
            attended = Attended(out_QHd[None, span.slots], lse_HQ[None, :, span.slots].contiguous())
            some = grad_QHd[None, span.slots], query_QHd[None, span.slots]
            for tokens, mask in _parts(span, query_QHd.dtype):
                grads = flash.cpu_backward(
                    *some, token_key_TGd[None, tokens], token_value_TGd[None, tokens], attended, scale, mask_QN=mask
                )
                query_grad[span.slots] += grads[0][0]
                key_grad[tokens] += grads[1][0]
                value_grad[tokens] += grads[2][0]
        return query_grad, key_grad, value_grad, *slot_grads, None, None, None


def _by_block(tensors: Iterable[Tensor], num_slots: int) -> list[Tensor]:
    """Each ``[Q, ..]`` as ``[A, slots, ..]``."""
    return [x.unflatten(0, (-1, num_slots)) for x in tensors]


def _forward_of_span(
    query_QHd: Tensor, token_key_TGd: Tensor, token_value_TGd: Tensor, span: _Span, scale: float
) -> Attended | None:
    """Attention over the tokens. None: no slot sees one."""
    attended = None
    for tokens, mask in _parts(span, query_QHd.dtype):
        out_1QHd, lse_1HQ = flash.cpu_forward(
            query_QHd[None], token_key_TGd[None, tokens], token_value_TGd[None, tokens], scale, mask_QN=mask
        )
        if mask is not None:
            lse_1HQ.masked_fill_(span.anchor_Q <= tokens.start, -torch.inf)
        part = Attended(out_1QHd[0], lse_1HQ[0])
        attended = part if attended is None else flash.merged(attended, part)
    return attended


def _parts(span: _Span, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor | None]]:
    """The sets of tokens that are not empty, each with the mask ``[Q, tokens]`` that is added to the scores."""
    if span.before.start < span.before.stop:
        yield span.before, None
    if span.near.start < span.near.stop:
        hidden_QN = torch.arange(span.near.start, span.near.stop) >= span.anchor_Q[:, None]
        yield span.near, torch.zeros(hidden_QN.shape, dtype=dtype).masked_fill_(hidden_QN, -torch.inf)


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
