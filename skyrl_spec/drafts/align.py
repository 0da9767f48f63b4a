"""Supervision and acceptance of drafted tokens, from masks, document ids and probabilities.

A *target position* p is a position whose next token, p+1, is drafted. The teacher is the policy's distribution at p. A
*chain* starts at its *base* t. Its depth d (from 1) drafts token t+d+1, so its target position is t+d.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_right(x_BS: Tensor, steps: int) -> Tensor:
    """``out[:, p] = x[:, p - steps]``, and zero outside the row. A negative ``steps`` shifts left."""
    out = torch.zeros_like(x_BS)
    if steps >= 0:
        out[:, steps:] = x_BS[:, : x_BS.shape[1] - steps]
    else:
        out[:, :steps] = x_BS[:, -steps:]
    return out


def chain_mask(loss_mask_BS: Tensor, segment_ids_BS: Tensor, num_depths: int) -> Tensor:
    """Bool ``[K, B, S]``: whether depth d is supervised at target position p, at index ``[d-1, b, p]``.

    It is if every token from the chain's first, t+1, to the drafted one, p+1, is a trained response token of the
    base's document. An engine drafts exactly these chains: it starts from a sampled token (t+1), and a drafted token
    counts only if all drafted tokens before it were accepted. Prompt, padding and observation tokens take no part.
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
    """Bool ``[B, S]``, True at the first token of each document."""
    return segment_ids_BS != shift_right(segment_ids_BS, 1)


def expected_acceptance(accept_prob_K: Tensor, hit_K: Tensor) -> Tensor:
    """Unbiased estimate of the probability that an engine accepts each of a chain's K drafted tokens, ``[K, ...]``.

    The estimate for depth d is ``hit_1 ... hit_{d-1} accept_prob_d``. An engine accepts token d if it accepts all
    tokens before it, and then d. Exact rejection sampling accepts a drafted token exactly as often as the policy
    samples it, so hits on sampled tokens have the right mean. A product of probabilities has not, because good drafts
    follow good drafts.

    Args:
        accept_prob_K: the policy's probability of each drafted token.
        hit_K: whether the sampled token is the drafted one.
    """
    reached_K = torch.cat([torch.ones_like(hit_K[:1]), hit_K[:-1]]).to(torch.float64).cumprod(dim=0)
    return reached_K * accept_prob_K


def chains_by_base(values_KBS: Tensor) -> Tensor:
    """Values by target position (as in ``chain_mask``), indexed by the base: depth d moves d to the left."""
    return torch.stack([shift_right(values_BS, -depth) for depth, values_BS in enumerate(values_KBS, start=1)])


def drafted_bases(hit_KBS: Tensor, is_base_BS: Tensor) -> Tensor:
    """Bool ``[B, S]``: bases at which an engine with this draft begins a chain while it samples these tokens.

    An engine begins at the first base of a response. After m hits in a row from base t, the next base is t + m + 1,
    behind the accepted tokens and the one that is sampled. Engines therefore begin at places where the draft was wrong
    more often than elsewhere, and acceptance is an average over these bases only.

    All rows are followed at once, in log2(S) jumps that double in length.

    Args:
        hit_KBS: by base, whether depth d drafted the sampled token; False without a drafted token.
        is_base_BS: possible bases. A run of them is a response.
    """
    seq_len = is_base_BS.shape[1]
    positions_S = torch.arange(seq_len, device=is_base_BS.device)
    num_hits_BS = hit_KBS.long().cumprod(dim=0).sum(dim=0)
    # An additional last position ends every path.
    jump_BS = (positions_S + 1 + num_hits_BS).clamp(max=seq_len).masked_fill(~is_base_BS, seq_len)
    jump_BS = torch.nn.functional.pad(jump_BS, (0, 1), value=seq_len)
    begun_BS = torch.nn.functional.pad(is_base_BS & ~shift_right(is_base_BS, 1), (0, 1)).long()
    for _ in range(seq_len.bit_length()):
        begun_BS = begun_BS.scatter_reduce(1, jump_BS, begun_BS, "amax")
        jump_BS = jump_BS.gather(1, jump_BS)
    return begun_BS[:, :seq_len].bool() & is_base_BS


def followed_acceptance(accept_prob_KBS: Tensor, hit_KBS: Tensor, mask_KBS: Tensor) -> tuple[Tensor, Tensor]:
    """Expected number of accepted tokens of each depth ``[K]``, and the number of chains, of ``drafted_bases``.

    All arguments are indexed by target position and zero outside ``mask`` (``chain_mask``). The last chain of a
    response often reaches beyond its end. vLLM counts these drafted tokens too and nearly always rejects them, so they
    count as rejected here.
    """
    hit_KBS = chains_by_base(hit_KBS)
    begun_BS = drafted_bases(hit_KBS, chains_by_base(mask_KBS)[0])
    expected_KBS = expected_acceptance(chains_by_base(accept_prob_KBS), hit_KBS)
    return expected_KBS[:, begun_BS].sum(dim=1), begun_BS.sum().double()
