"""Training blocks of a DFlash draft: their anchors, supervised slots and visible keys.

A block begins at an *anchor*. Slot 0 holds the anchor's token, slots 1 to K hold mask tokens, and slot i predicts the
token at its own position, anchor + i.

Shapes: B batch, S sequence, A anchors per sequence, K drafted slots, Q = A (K + 1) slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_spec.drafts.align import shift_right


@dataclass(frozen=True)
class Blocks:
    """Blocks of a micro-batch."""

    # Position in the row. Arbitrary for blocks without a supervised slot, if a row has fewer than A anchors.
    anchor_BA: Tensor
    # Bool: whether slot i + 1 is supervised, at index i.
    supervised_BAK: Tensor

    @property
    def num_slots(self) -> int:
        """Slots of a block, K + 1."""
        return self.supervised_BAK.shape[2] + 1

    def positions_BQ(self) -> Tensor:
        """Position of every slot. The last ones may lie beyond the end of the row."""
        slots = torch.arange(self.num_slots, device=self.anchor_BA.device)
        return (self.anchor_BA[:, :, None] + slots).flatten(1)


def draw_blocks(
    loss_mask_BS: Tensor, segment_ids_BS: Tensor, num_anchors: int, num_drafted: int, generator: torch.Generator
) -> Blocks:
    """``num_anchors`` random blocks per row. If a row has fewer anchors, it gets all of them and unsupervised blocks.

    An anchor is a trained response token whose next token is trained too: an engine drafts after a sampled token.
    ``generator`` is on the CPU, so that the draw does not depend on the device.
    """
    valid_BS = loss_mask_BS & follows_in_response(loss_mask_BS, segment_ids_BS, 1)
    priority_BS = torch.rand(valid_BS.shape, generator=generator).to(valid_BS.device)
    num_anchors = min(num_anchors, valid_BS.shape[1])
    anchor_BA = priority_BS.masked_fill(~valid_BS, -1.0).topk(num_anchors, dim=1).indices.sort(dim=1).values
    supervised_BKS = torch.stack(
        [follows_in_response(loss_mask_BS, segment_ids_BS, slot) for slot in range(1, num_drafted + 1)], dim=1
    )
    # Slots after the first unsupervised one are unsupervised: an engine would not get there.
    supervised_BKS = supervised_BKS.cummin(dim=1).values & valid_BS[:, None]
    index_BAK = anchor_BA[:, None].expand(-1, num_drafted, -1)
    return Blocks(anchor_BA, supervised_BKS.gather(2, index_BAK).transpose(1, 2))


def follows_in_response(loss_mask_BS: Tensor, segment_ids_BS: Tensor, steps: int) -> Tensor:
    """Bool ``[B, S]``: whether the token ``steps`` later is trained on and belongs to the same document."""
    if steps >= loss_mask_BS.shape[1]:
        return torch.zeros_like(loss_mask_BS)
    same_BS = (shift_right(segment_ids_BS, -steps) == segment_ids_BS) & (segment_ids_BS > 0)
    return shift_right(loss_mask_BS, -steps) & same_BS


def position_weights(num_drafted: int, gamma: float, device: torch.device) -> Tensor:
    """Loss weights ``exp(-(i - 1) / gamma)`` of slots i = 1 to K, float32 ``[K]``.

    An early drafted token weighs more, because all later ones depend on its acceptance.
    """
    return torch.exp(-torch.arange(num_drafted, device=device) / gamma)


def visible(blocks: Blocks, segment_ids_BS: Tensor) -> Tensor:
    """Bool ``[B, 1, Q, S + Q]``: whether a slot sees a key. Keys of the sequence come first, then keys of the slots.

    A slot sees the anchor's document strictly before the anchor, and all slots of its block, so it always sees a key.
    """
    anchor_BQ, block_Q = _of_slots(blocks)
    index_S = torch.arange(segment_ids_BS.shape[1], device=segment_ids_BS.device)
    before_BQS = index_S < anchor_BQ[..., None]
    same_BQS = segment_ids_BS[:, None] == segment_ids_BS.gather(1, anchor_BQ)[..., None]
    own_QQ = block_Q[:, None] == block_Q
    own_BQQ = own_QQ.expand(len(anchor_BQ), -1, -1)
    return torch.cat([before_BQS & same_BQS, own_BQQ], dim=2)[:, None]


def visible_mod(blocks: Blocks, segment_ids_BS: Tensor):  # type: ignore[no-untyped-def]
    """``visible`` as FlexAttention's mask function of (batch, head, slot, key)."""
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
    """Anchor ``[B, Q]`` and block number ``[Q]`` of every slot."""
    anchor_BQ = blocks.anchor_BA.repeat_interleave(blocks.num_slots, dim=1)
    numbers_A = torch.arange(blocks.anchor_BA.shape[1], device=anchor_BQ.device)
    return anchor_BQ, numbers_A.repeat_interleave(blocks.num_slots)
