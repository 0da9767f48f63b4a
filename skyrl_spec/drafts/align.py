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


def expected_acceptance(accept_prob_K: Tensor, hit_K: Tensor) -> Tensor:
    """Probability that an engine accepts each of a chain's K drafted tokens, ``[K, ...]``, from what it sampled.

    ``accept_prob[d]`` is the policy's probability of the drafted token d, ``hit[d]`` that it is the token which was
    sampled. An engine accepts d if it accepts all before it and then d itself; since a sampled token is the drafted one
    just as often as exact rejection sampling accepts that, ``hit_1 ... hit_{d-1} accept_prob_d`` has the right mean.
    (A product of probabilities alone has not: where one draft is good the next one often is.)
    """
    reached_K = torch.cat([torch.ones_like(hit_K[:1]), hit_K[:-1]]).to(torch.float64).cumprod(dim=0)
    return reached_K * accept_prob_K


def chains_by_base(values_KBS: Tensor) -> Tensor:
    """What is by target position, as in ``chain_mask``, by the chain's base: depth d moves d to the left."""
    return torch.stack([shift_right(values_BS, -depth) for depth, values_BS in enumerate(values_KBS, start=1)])


def drafted_bases(hit_KBS: Tensor, is_base_BS: Tensor) -> Tensor:
    """Bool ``[B, S]``: the bases that an engine with this draft begins a chain at while it samples these very tokens.

    It begins at the first base of each response (``is_base`` marks runs of possible ones), and then where the accepted
    tokens and the one sampled behind them end: ``m`` hits in a row lead from base t to ``t + m + 1``. So it begins
    where the draft was wrong more often than elsewhere, and what it accepts is an average over these bases alone.

    ``hit`` is by base: whether depth d drafted the sampled token; False where there is none. All such ways are
    followed at once, in log2(S) steps that double in length.
    """
    seq_len = is_base_BS.shape[1]
    positions_S = torch.arange(seq_len, device=is_base_BS.device)
    num_hits_BS = hit_KBS.long().cumprod(dim=0).sum(dim=0)
    # One position more, from which there is no way on.
    jump_BS = (positions_S + 1 + num_hits_BS).clamp(max=seq_len).masked_fill(~is_base_BS, seq_len)
    jump_BS = torch.nn.functional.pad(jump_BS, (0, 1), value=seq_len)
    begun_BS = torch.nn.functional.pad(is_base_BS & ~shift_right(is_base_BS, 1), (0, 1)).long()
    for _ in range(seq_len.bit_length()):
        begun_BS = begun_BS.scatter_reduce(1, jump_BS, begun_BS, "amax")
        jump_BS = jump_BS.gather(1, jump_BS)
    return begun_BS[:, :seq_len].bool() & is_base_BS


def followed_acceptance(accept_prob_KBS: Tensor, hit_KBS: Tensor, mask_KBS: Tensor) -> tuple[Tensor, Tensor]:
    """What an engine with this draft accepts while it samples these tokens: ``[K]``, and of how many chains.

    All three are by target position and zero outside ``mask`` (``chain_mask``). Every chain of ``drafted_bases``
    counts. The last one of a response often reaches behind its end: vLLM counts its drafts too, and nearly always
    rejects what lies there, as is assumed here.
    """
    hit_KBS = chains_by_base(hit_KBS)
    begun_BS = drafted_bases(hit_KBS, chains_by_base(mask_KBS)[0])
    expected_KBS = expected_acceptance(chains_by_base(accept_prob_KBS), hit_KBS)
    return expected_KBS[:, begun_BS].sum(dim=1), begun_BS.sum().double()
