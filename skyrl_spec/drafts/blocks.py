"""Blocks of a DFlash draft in training: where they begin, what of them is supervised, what their slots may see.

A block begins at an *anchor*: slot 0 holds the anchor's token, slots 1 … K are masked, and slot i predicts the token at
its own position, anchor + i. Shapes: B batch, S sequence, A anchors a sequence, K drafted slots, Q = A (K + 1) slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_spec.drafts.align import shift_right


@dataclass(frozen=True)
class Blocks:
    """Anchors of a micro-batch and which of their drafted slots are supervised."""

    # Position in its row; any position where the row has fewer anchors than A.
    anchor_BA: Tensor
    # Slot i + 1 counts.
    supervised_BAK: Tensor

    @property
    def num_slots(self) -> int:
        return self.supervised_BAK.shape[2] + 1

    def positions_BQ(self) -> Tensor:
        """Position of every slot; the last ones may lie behind the row."""
        slots = torch.arange(self.num_slots, device=self.anchor_BA.device)
        return (self.anchor_BA[:, :, None] + slots).flatten(1)


def draw_blocks(
    loss_mask_BS: Tensor, segment_ids_BS: Tensor, num_anchors: int, num_drafted: int, generator: torch.Generator
) -> Blocks:
    """``num_anchors`` blocks a row at random; all there are, and unsupervised ones besides, if there are fewer.

    Anchors are response tokens whose next token is supervised too: an engine drafts behind a sampled token.
    ``generator`` lives on the CPU, so that the draw is the same on every device.
    """
    valid_BS = loss_mask_BS & follows_in_response(loss_mask_BS, segment_ids_BS, 1)
    priority_BS = torch.rand(valid_BS.shape, generator=generator).to(valid_BS.device)
    num_anchors = min(num_anchors, valid_BS.shape[1])
    anchor_BA = priority_BS.masked_fill(~valid_BS, -1.0).topk(num_anchors, dim=1).indices.sort(dim=1).values
    supervised_BKS = torch.stack(
        [follows_in_response(loss_mask_BS, segment_ids_BS, slot) for slot in range(1, num_drafted + 1)], dim=1
    )
    # A label behind the first unsupervised token is none: the engine would not get there.
    supervised_BKS = supervised_BKS.cummin(dim=1).values & valid_BS[:, None]
    index_BAK = anchor_BA[:, None].expand(-1, num_drafted, -1)
    return Blocks(anchor_BA, supervised_BKS.gather(2, index_BAK).transpose(1, 2))


def follows_in_response(loss_mask_BS: Tensor, segment_ids_BS: Tensor, steps: int) -> Tensor:
    """Bool ``[B, S]``: the token ``steps`` on is trained on, and of the same document."""
    if steps >= loss_mask_BS.shape[1]:
        return torch.zeros_like(loss_mask_BS)
    same_BS = (shift_right(segment_ids_BS, -steps) == segment_ids_BS) & (segment_ids_BS > 0)
    return shift_right(loss_mask_BS, -steps) & same_BS


def position_weights(num_drafted: int, gamma: float, device: torch.device) -> Tensor:
    """``exp(-(i - 1) / gamma)`` of slots i = 1 … K, float32 ``[K]``: early drafts matter to all that follow."""
    return torch.exp(-torch.arange(num_drafted, device=device) / gamma)


def visible(blocks: Blocks, segment_ids_BS: Tensor) -> Tensor:
    """Bool ``[B, 1, Q, S + Q]``: which keys a slot sees, those of the sequence first, then those of the slots.

    The sequence strictly before its anchor, of the anchor's document, and all slots of its own block. So no slot is
    without a key.
    """
    anchor_BQ, block_Q = _of_slots(blocks)
    index_S = torch.arange(segment_ids_BS.shape[1], device=segment_ids_BS.device)
    before_BQS = index_S < anchor_BQ[..., None]
    same_BQS = segment_ids_BS[:, None] == segment_ids_BS.gather(1, anchor_BQ)[..., None]
    own_QQ = block_Q[:, None] == block_Q
    own_BQQ = own_QQ.expand(len(anchor_BQ), -1, -1)
    return torch.cat([before_BQS & same_BQS, own_BQQ], dim=2)[:, None]


def visible_mod(blocks: Blocks, segment_ids_BS: Tensor):  # type: ignore[no-untyped-def]
    """``visible`` as FlexAttention takes it: a function of indices (batch, head, slot, key)."""
    anchor_BQ, block_Q = _of_slots(blocks)
    num_context, num_slots = segment_ids_BS.shape[1], len(block_Q)
    anchor_segment_BQ = segment_ids_BS.gather(1, anchor_BQ)

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        context = k.clamp(max=num_context - 1)
        seen = (context < anchor_BQ[b, q]) & (segment_ids_BS[b, context] == anchor_segment_BQ[b, q])
        own = block_Q[q] == block_Q[(k - num_context).clamp(0, num_slots - 1)]
        return torch.where(k < num_context, seen, own)

    return mod


def _of_slots(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The anchor of every slot ``[B, Q]`` and its block's number ``[Q]``."""
    anchor_BQ = blocks.anchor_BA.repeat_interleave(blocks.num_slots, dim=1)
    numbers_A = torch.arange(blocks.anchor_BA.shape[1], device=anchor_BQ.device)
    return anchor_BQ, numbers_A.repeat_interleave(blocks.num_slots)
