"""A pack: documents laid end to end, the shape in which policy and draft compute. There is no padding.

Shapes: T tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.models.flash import Documents


@dataclass(frozen=True)
class Pack:
    """Tokens of one or more documents, all on one device. A pack has at least one token."""

    # int64
    token_ids_T: Tensor
    # Bool: response tokens that are trained on.
    loss_mask_T: Tensor
    # Number of each token's document, from 1.
    segment_ids_T: Tensor
    # Position in the document, from 0.
    position_T: Tensor
    documents: Documents


def pack_documents(token_ids_T: np.ndarray, loss_mask_T: np.ndarray, lengths: Sequence[int]) -> Pack:
    """Pack on the CPU, of documents of these lengths. Both arrays hold one document after the other."""
    lengths_N = np.asarray(lengths, np.int64)
    starts_N = np.cumsum(lengths_N) - lengths_N
    return Pack(
        token_ids_T=torch.as_tensor(token_ids_T, dtype=torch.int64),
        loss_mask_T=torch.as_tensor(loss_mask_T, dtype=torch.bool),
        segment_ids_T=torch.from_numpy(np.repeat(np.arange(1, len(lengths_N) + 1), lengths_N)),
        position_T=torch.from_numpy(np.arange(len(token_ids_T)) - np.repeat(starts_N, lengths_N)),
        documents=Documents.of(lengths_N.tolist()),
    )


def first_tokens(pack: Pack, counts: Sequence[int]) -> tuple[Tensor, Pack]:
    """The first ``counts[i]`` tokens of each document i of a pack on the CPU: their indices in it, and their pack.

    A document with count 0 is left out. At least one must have tokens.
    """
    starts_N, counts_N = np.asarray(pack.documents.starts[:-1]), np.asarray(counts)
    index_T = ranges(starts_N, starts_N + counts_N)
    part = pack_documents(
        pack.token_ids_T.numpy()[index_T], pack.loss_mask_T.numpy()[index_T], counts_N[counts_N > 0].tolist()
    )
    return torch.from_numpy(index_T), part


def ranges(first_N: np.ndarray, end_N: np.ndarray) -> np.ndarray:
    """Integers from ``first`` to ``end`` (exclusive) of each range, one range after the other."""
    lengths_N = end_N - first_N
    offsets_N = first_N - (np.cumsum(lengths_N) - lengths_N)
    return np.repeat(offsets_N, lengths_N) + np.arange(lengths_N.sum())


def table_length(num_positions: int) -> int:
    """Length of a rotary table for this many positions. Megatron keeps the last few lengths, so there are few."""
    return 1 << (num_positions - 1).bit_length()
