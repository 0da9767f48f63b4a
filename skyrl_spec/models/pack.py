"""A pack: documents laid end to end, the shape in which policy and draft compute. There is no padding.

Shapes: T tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from skyrl_spec.models.flash import Documents


@dataclass(frozen=True)
class SharedChunk:
    """Consecutive tokens of a pack, whose activations one rank has."""

    tokens: slice
    # Tokens whose keys they see: from the start of the first token's document.
    keys: slice
    # These keys as documents, and the chunk's tokens, the last ones of each.
    documents: Documents
    queries: Documents


@dataclass(frozen=True)
class Share:
    """This rank's part of a pack's tokens (``models.context_parallel``): two chunks of equal length, in order."""

    group: ProcessGroup
    rank: int
    size: int
    chunks: tuple[SharedChunk, ...]

    @property
    def rows(self) -> tuple[slice, slice]:
        """The rows of each chunk in tensors of this rank's tokens."""
        length = self.chunks[0].tokens.stop - self.chunks[0].tokens.start
        return slice(0, length), slice(length, 2 * length)

    def owners(self, positions: np.ndarray) -> np.ndarray:
        """The ranks that have the tokens at these positions of the pack."""
        numbers = positions // self.rows[0].stop
        return np.minimum(numbers, 2 * self.size - 1 - numbers)

    @property
    def positions(self) -> np.ndarray:
        """Index in the pack of each of this rank's tokens."""
        return np.concatenate([np.arange(chunk.tokens.start, chunk.tokens.stop) for chunk in self.chunks])


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
    # The tokens whose activations this rank has. None: all.
    share: Share | None = None
    # Experts that tokens are sent to in each layer, ``[T, L, k]`` int16. -1: the router chooses. None: of all tokens.
    experts_TLk: Tensor | None = None

    def own(self, x_T: Tensor) -> Tensor:
        """The entries of this rank's tokens."""
        if self.share is None:
            return x_T
        return torch.cat([x_T[chunk.tokens] for chunk in self.share.chunks])

    def owned(self, positions: np.ndarray) -> np.ndarray:
        """Indices of those of these positions of the pack whose tokens this rank has."""
        if self.share is None:
            return np.arange(len(positions))
        return np.flatnonzero(self.share.owners(positions) == self.share.rank)

    @property
    def num_own(self) -> int:
        """Number of this rank's tokens."""
        return len(self.token_ids_T) if self.share is None else self.share.rows[1].stop


def extended_experts(pack: Pack, num_added: int) -> Tensor | None:
    """``experts_TLk`` for so many tokens more, whose experts the router chooses."""
    return None if pack.experts_TLk is None else pad(pack.experts_TLk, (0, 0, 0, 0, 0, num_added), value=-1)


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
