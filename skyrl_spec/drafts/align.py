"""Which drafted tokens are supervised, from masks and document ids alone.

A *target position* p is the position whose next token, p+1, is drafted: the teacher is the policy's distribution at
p. A chain starts at base t; its depth d (1-based) drafts token t+d+1, so its target position is t+d.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_right(x_BS: Tensor, steps: int) -> Tensor:
    """``out[:, p] = x[:, p - steps]``, zero where that lies before the row (``steps`` < 0 shifts left)."""
    out = torch.zeros_like(x_BS)
    if steps >= 0:
        out[:, steps:] = x_BS[:, : x_BS.shape[1] - steps]
    else:
        out[:, :steps] = x_BS[:, -steps:]
    return out


def chain_mask(loss_mask_BS: Tensor, segment_ids_BS: Tensor, num_depths: int) -> Tensor:
    """Bool ``[K, B, S]``: entry ``[d-1, b, p]`` says that depth d is supervised at target position p.

    It is where every token from the chain's first, t+1, to the drafted one, p+1, is a trained response token of base
    t's own document. Those are the chains an engine drafts: it starts from a sampled token (t+1), and a draft counts
    only if all before it were accepted. Prompt, padding and observation tokens are never drafted from nor to.
    """
    label_BS = shift_right(loss_mask_BS, -1)
    label_segment_BS = shift_right(segment_ids_BS, -1)
    valid_BS, masks = label_BS.clone(), []
    for depth in range(1, num_depths + 1):
        valid_BS = valid_BS & shift_right(label_BS, depth)
        base_segment_BS = shift_right(segment_ids_BS, depth)
        valid_BS = valid_BS & (base_segment_BS == label_segment_BS) & (base_segment_BS > 0)
        masks.append(valid_BS)
    return torch.stack(masks)


def document_starts(segment_ids_BS: Tensor) -> Tensor:
    """Bool ``[B, S]``: the first token of each document."""
    return segment_ids_BS != shift_right(segment_ids_BS, 1)


def accepted_lengths(accept_prob_KBS: Tensor, mask_KBS: Tensor) -> tuple[Tensor, Tensor]:
    """Summed expected acceptance length of the chains that have all K depths, and how many those are.

    A chain's length is ``1 + a_1 + a_1 a_2 + ... + a_1 ... a_K``, where ``a_d`` is the probability that exact rejection
    sampling accepts depth d. ``accept_prob`` and ``mask`` are by target position, as in ``chain_mask``.
    """
    num_depths = len(mask_KBS)
    by_base = [shift_right(a, -depth) for depth, a in enumerate(accept_prob_KBS, start=1)]
    complete_BS = shift_right(mask_KBS[-1], -num_depths)
    expected_BS = 1.0 + torch.stack(by_base).double().cumprod(dim=0).sum(dim=0)
    return expected_BS[complete_BS].sum(), complete_BS.sum().double()
