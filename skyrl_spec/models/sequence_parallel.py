"""Sequence parallelism: between the matrix products of a layer, each tensor-parallel rank holds a part of the tokens.

It is inside the trunk. What goes in and comes out is whole on every rank, and so is what a draft captures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import pad

from skyrl_spec.models.flash import Documents
from skyrl_spec.models.pack import Pack, extended_experts


def padded(pack: Pack, multiple: int) -> Pack:
    """``pack`` with tokens at its end, a document of their own, so that its length is a multiple."""
    num_added = -len(pack.token_ids_T) % multiple
    if num_added == 0:
        return pack
    documents = pack.documents
    added = (0, num_added)
    return replace(
        pack,
        token_ids_T=pad(pack.token_ids_T, added),
        loss_mask_T=pad(pack.loss_mask_T, added),
        segment_ids_T=pad(pack.segment_ids_T, added, value=len(documents.lengths) + 1),
        position_T=pad(pack.position_T, added),
        experts_TLk=extended_experts(pack, num_added),
        documents=Documents(
            (*documents.lengths, num_added), torch.cat([documents.start_N, documents.start_N[-1:] + num_added])
        ),
    )


def whole(part_T1D: Tensor, num_tokens: int) -> Tensor:
    """All ranks' parts of a padded sequence, without the padding, ``[T, D]``. Collective.

    Every rank must compute the same gradient of the result. Each takes its part of it.
    """
    return gather_from_sequence_parallel_region(part_T1D, tensor_parallel_output_grad=False)[:num_tokens, 0]
