"""Training blocks of a DFlash draft: their anchors, supervised slots and visible keys.

A block begins at an *anchor*. Slot 0 holds the anchor's token, slots 1 to K hold mask tokens, and slot i predicts the
token at its own position, anchor + i.

Shapes: T tokens of a pack, A blocks, K drafted slots, Q = A (K + 1) slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.drafts.align import follows_in_response
from skyrl_spec.models.pack import Pack


@dataclass(frozen=True)
class Blocks:
    """Blocks of a pack, in the order of their anchors. There is at least one."""

    # Index of the anchor in the pack.
    anchor_A: Tensor
    # Index of the first token of the anchor's document.
    start_A: Tensor
    # Bool: whether slot i + 1 is supervised, at index i.
    supervised_AK: Tensor
    # The anchors and starts, for the host.
    anchors: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """Slots of a block, K + 1."""
        return self.supervised_AK.shape[1] + 1

    def position_Q(self) -> Tensor:
        """Position of every slot in its document. The last ones may lie beyond the document's end."""
        slots = torch.arange(self.num_slots, device=self.anchor_A.device)
        return ((self.anchor_A - self.start_A)[:, None] + slots).flatten()


def blocks_at(anchors: Sequence[int], pack: Pack, supervised_AK: Tensor) -> Blocks:
    """Blocks on the CPU with these ascending anchors in ``pack``."""
    document_starts = np.asarray(pack.documents.starts)
    starts = document_starts[np.searchsorted(document_starts, anchors, side="right") - 1].tolist()
    return Blocks(torch.tensor(anchors), torch.tensor(starts), supervised_AK, tuple(anchors), tuple(starts))


def is_anchor(loss_mask: np.ndarray) -> np.ndarray:
    """Bool, like ``loss_mask`` ``[..., tokens of a row]``: tokens that a block may begin at.

    An anchor is a trained response token whose next token is trained too: an engine drafts after a sampled token.
    """
    candidates = np.zeros_like(loss_mask)
    candidates[..., :-1] = loss_mask[..., :-1] & loss_mask[..., 1:]
    return candidates


def draw_anchors(pack: Pack, seeds: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[int]:
    """Random anchors of a pack on the CPU, ascending: ``numbers[i]`` of document i, or all if there are fewer.

    Args:
        seeds: of each document, so that its anchors depend neither on its place in the pack nor on its neighbours.
    """
    anchors: list[int] = []
    loss_mask_T = pack.loss_mask_T.numpy()
    for seed, number, tokens in zip(seeds, numbers, pack.documents.slices(), strict=True):
        candidates = tokens.start + np.flatnonzero(is_anchor(loss_mask_T[tokens]))
        if len(candidates) > number:
            candidates = np.sort(np.random.default_rng(seed).choice(candidates, number, replace=False))
        anchors += candidates.tolist()
    return anchors


def supervised_blocks(anchors: Sequence[int], pack: Pack, num_drafted: int) -> Blocks:
    """Blocks at ascending ``anchors``. A slot is supervised if its token and all before it in the block are trained.

    An engine would not get to a slot behind the first unsupervised one.
    """
    anchor_A = torch.tensor(anchors)
    loss_mask_T, segment_ids_T = pack.loss_mask_T, pack.segment_ids_T
    trained_KA = torch.stack(
        [follows_in_response(loss_mask_T, segment_ids_T, slot)[anchor_A] for slot in range(1, num_drafted + 1)]
    )
    supervised_KA = trained_KA.cummin(dim=0).values & loss_mask_T[anchor_A]
    return blocks_at(anchors, pack, supervised_KA.t().contiguous())


def position_weights(num_drafted: int, gamma: float) -> Tensor:
    """Loss weights ``exp(-(i - 1) / gamma)`` of slots i = 1 to K, float32 ``[K]``.

    An early drafted token weighs more, because all later ones depend on its acceptance.
    """
    return torch.exp(-torch.arange(num_drafted) / gamma)


def visible(blocks: Blocks, num_tokens: int) -> Tensor:
    """Bool ``[Q, T + Q]``: whether a slot sees a key. Keys of the tokens come first, then keys of the slots.

    A slot sees the anchor's document strictly before the anchor, and all slots of its block, so it always sees a key.
    This is the definition. The kernels never build it.
    """
    anchor_Q1, start_Q1 = (x.repeat_interleave(blocks.num_slots)[:, None] for x in (blocks.anchor_A, blocks.start_A))
    index_T = torch.arange(num_tokens, device=anchor_Q1.device)
    block_Q = torch.arange(len(anchor_Q1), device=anchor_Q1.device) // blocks.num_slots
    return torch.cat([(start_Q1 <= index_T) & (index_T < anchor_Q1), block_Q[:, None] == block_Q], dim=1)
