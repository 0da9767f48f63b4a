"""Supervision and acceptance of drafted tokens, from masks, document ids and probabilities.

A *target position* p is a position whose next token, p+1, is drafted. The teacher is the policy's distribution at p. A
*chain* starts at its *base* t. Its depth d (from 1) drafts token t+d+1, so its target position is t+d.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_right(x_T: Tensor, steps: int) -> Tensor:
    """``out[p] = x[p - steps]``, and zero outside the pack. A negative ``steps`` shifts left."""
    out, kept = torch.zeros_like(x_T), max(len(x_T) - abs(steps), 0)
    if steps >= 0:
        out[len(x_T) - kept :] = x_T[:kept]
    else:
        out[:kept] = x_T[len(x_T) - kept :]
    return out


def chain_mask(loss_mask_T: Tensor, segment_ids_T: Tensor, num_depths: int) -> Tensor:
    """Bool ``[K, T]``: whether depth d is supervised at target position p, at index ``[d-1, p]``.

    It is if every token from the chain's first, t+1, to the drafted one, p+1, is a trained response token of the
    base's document. An engine drafts exactly these chains: it starts from a sampled token (t+1), and a drafted token
    counts only if all drafted tokens before it were accepted. Prompt and observation tokens take no part.
    """
    label_T = shift_right(loss_mask_T, -1)
    label_segment_T = shift_right(segment_ids_T, -1)
    valid_T, masks = label_T.clone(), []
    for depth in range(1, num_depths + 1):
        valid_T = valid_T & shift_right(label_T, depth)
        base_segment_T = shift_right(segment_ids_T, depth)
        valid_T = valid_T & (base_segment_T == label_segment_T) & (base_segment_T > 0)
        masks.append(valid_T)
    return torch.stack(masks)


def follows_in_response(loss_mask_T: Tensor, segment_ids_T: Tensor, steps: int) -> Tensor:
    """Bool ``[T]``: whether the token ``steps`` later is trained on and belongs to the same document."""
    return shift_right(loss_mask_T, -steps) & (shift_right(segment_ids_T, -steps) == segment_ids_T)


def expected_acceptance(accept_prob_K: Tensor, hit_K: Tensor) -> Tensor:
    """Unbiased estimate of the probability that an engine accepts each of a chain's K drafted tokens, ``[K, ...]``.

    The estimate for depth d is ``hit_1 ... hit_{d-1} accept_prob_d``. An engine accepts token d if it accepts all
    tokens before it, and then d. Exact rejection sampling accepts a drafted token exactly as often as the policy
    samples it, so hits on sampled tokens have the right mean. A product of probabilities has not, because good drafts
    follow good drafts.

    A draft that is sampled hits token x with probability ``min(1, q(x) / p(x))``: so often, a sampled x is an accepted
    draft. A random hit of this probability has the right mean, too.

    Args:
        accept_prob_K: probability that each drafted token is accepted.
        hit_K: whether the sampled token is an accepted draft.
    """
    reached_K = torch.cat([torch.ones_like(hit_K[:1]), hit_K[:-1]]).to(torch.float64).cumprod(dim=0)
    return reached_K * accept_prob_K


def chains_by_base(values_KT: Tensor) -> Tensor:
    """Values by target position (as in ``chain_mask``), indexed by the base: depth d moves d to the left."""
    return torch.stack([shift_right(values_T, -depth) for depth, values_T in enumerate(values_KT, start=1)])


def drafted_bases(hit_KT: Tensor, is_base_T: Tensor) -> Tensor:
    """Bool ``[T]``: bases at which an engine with this draft begins a chain while it samples these tokens.

    An engine begins at the first base of a response. After m hits in a row from base t, the next base is t + m + 1,
    behind the accepted tokens and the one that is sampled. Engines therefore begin at places where the draft was wrong
    more often than elsewhere, and acceptance is an average over these bases only.

    All responses are followed at once, in log2(T) jumps that double in length.

    Args:
        hit_KT: by base, whether depth d drafted the sampled token; False without a drafted token.
        is_base_T: possible bases. A run of them is a response.
    """
    num_tokens = len(is_base_T)
    positions_T = torch.arange(num_tokens, device=is_base_T.device)
    num_hits_T = hit_KT.long().cumprod(dim=0).sum(dim=0)
    # An additional last position ends every path.
    jump_T = (positions_T + 1 + num_hits_T).clamp(max=num_tokens).masked_fill(~is_base_T, num_tokens)
    jump_T = torch.nn.functional.pad(jump_T, (0, 1), value=num_tokens)
    begun_T = torch.nn.functional.pad(is_base_T & ~shift_right(is_base_T, 1), (0, 1)).long()
    for _ in range(num_tokens.bit_length()):
        begun_T = begun_T.scatter_reduce(0, jump_T, begun_T, "amax")
        jump_T = jump_T.gather(0, jump_T)
    return begun_T[:num_tokens].bool() & is_base_T


def followed_acceptance(
    accept_prob_KT: Tensor, hit_KT: Tensor, mask_KT: Tensor, is_counted_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Expected number of accepted tokens of each depth ``[K]``, and the number of chains, of ``drafted_bases``.

    The last chain of a response often reaches beyond its end. vLLM counts these drafted tokens too and nearly always
    rejects them, so they count as rejected here.

    Args:
        accept_prob_KT: by target position and zero outside the mask, as ``hit_KT``.
        mask_KT: ``chain_mask``, or a part of it that holds whole chains.
        is_counted_T: bases whose chains count.
    """
    hit_KT = chains_by_base(hit_KT)
    begun_T = drafted_bases(hit_KT, chains_by_base(mask_KT)[0]) & is_counted_T
    expected_KT = expected_acceptance(chains_by_base(accept_prob_KT), hit_KT)
    return (expected_KT * begun_T).sum(dim=1), begun_T.sum().double()
