"""Top-k and top-p of the rollouts, applied to a distribution over a sharded vocabulary.

Engines that sample with top-k or top-p sample from the policy's most probable tokens only, renormalised. That is the
distribution that a draft has to meet. Like vLLM's samplers, top-k comes first, and top-p acts on what it leaves.

Shape suffixes: c tokens of one chunk, v this rank's tokens of the vocabulary, R ranks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from skyrl_spec.losses.vocab_parallel import VocabShard, all_gather_columns, row_blocks

# The least probability of a nucleus is looked for between the largest probability and 2^-32 of it, by halvings of the
# ratio: to 32 / 2^24 of an octave, 1e-6 of itself.
_OCTAVES, _HALVINGS = 32.0, 24


def kth_largest(values_cv: Tensor, k: int, shard: VocabShard) -> Tensor:
    """The ``k``-th largest value of each row over all ranks ``[c]``; the lowest number if there are fewer.

    One collective.
    """
    candidates_cn = values_cv.new_full((len(values_cv), k), torch.finfo(values_cv.dtype).min)
    num_local = min(k, values_cv.shape[1])
    candidates_cn[:, :num_local] = values_cv.topk(num_local, sorted=False).values
    (candidates_Rcn,) = all_gather_columns([candidates_cn], shard.group)
    return candidates_Rcn.transpose(0, 1).flatten(1).topk(k).values[:, -1]


def keep_top_k_(logits_cv: Tensor, k: int, shard: VocabShard) -> None:
    """Gives the logits below the ``k``-th largest the lowest value. Tokens that tie for the last place are all kept."""
    logits_cv.masked_fill_(logits_cv < kth_largest(logits_cv, k, shard)[:, None], torch.finfo(logits_cv.dtype).min)


def keep_nucleus_(probs_cv: Tensor, top_p: float, shard: VocabShard) -> None:
    """Keeps the fewest most probable tokens that have at least ``top_p`` together, renormalised.

    Tokens that tie for the last place are all kept. The least probability that is kept is found by halving, so no rank
    sorts its vocabulary. One collective for each halving.
    """
    largest_c = _over_ranks(probs_cv.max(-1).values, shard).max(0).values
    # A nucleus that needs still less probable tokens has all.
    least_c, octaves_c, step = torch.zeros_like(largest_c), torch.full_like(largest_c, -_OCTAVES), _OCTAVES
    for _ in range(_HALVINGS):
        step /= 2
        trial_c = largest_c * (octaves_c + step).exp2()
        has_enough_c = _mass_from(probs_cv, trial_c, shard) >= top_p
        least_c, octaves_c = torch.where(has_enough_c, trial_c, least_c), octaves_c + step * has_enough_c
    probs_cv.masked_fill_(probs_cv < least_c[:, None], 0.0)
    renormalise_(probs_cv, shard)


def keep_most_probable_(probs_cv: Tensor, k: int, shard: VocabShard) -> None:
    """Keeps the ``k`` most probable tokens and those that tie with the last, renormalised. Two collectives."""
    probs_cv.masked_fill_(probs_cv < kth_largest(probs_cv, k, shard)[:, None], 0.0)
    renormalise_(probs_cv, shard)


def renormalise_(probs_cv: Tensor, shard: VocabShard) -> None:
    """Divides by the sum over all ranks. One collective."""
    probs_cv.div_(_over_ranks(probs_cv.sum(-1), shard).sum(0)[:, None])


def _mass_from(probs_cv: Tensor, least_c: Tensor, shard: VocabShard) -> Tensor:
    """Total probability of the tokens that have at least ``least_c`` each, ``[c]``. One collective."""
    if probs_cv.is_cuda:
        mass_c = _compiled_mass()(probs_cv, least_c[:, None])
    else:
        mass_c = torch.cat([_local_mass(*block) for block in row_blocks(probs_cv, least_c[:, None])])
    return _over_ranks(mass_c, shard).sum(0)


def _local_mass(probs_cv: Tensor, least_c1: Tensor) -> Tensor:
    return torch.where(probs_cv >= least_c1, probs_cv, 0.0).sum(-1)


@cache
def _compiled_mass() -> Any:
    """One pass over the probabilities, without temporaries. Only a draft's training depends on its rounding."""
    return torch.compile(_local_mass)


def _over_ranks(values_c: Tensor, shard: VocabShard) -> Tensor:
    """``[R, c]``"""
    return all_gather_columns([values_c], shard.group)[0]
