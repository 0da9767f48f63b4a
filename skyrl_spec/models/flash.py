"""Flash attention over documents laid end to end, with the log-sum-exp of its scores. Memory is linear in tokens.

``documents_attention`` is the whole operation. ``forward`` and ``backward`` are its halves, for an attention that
merges further keys into the softmax: the gradient of a softmax over two sets of keys is, for each set, that of a
softmax over this set alone if output and log-sum-exp are those over both.

Shapes: T tokens of all documents, H query heads, G key heads (a divisor of H), d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Documents:
    """Documents that lie end to end. Their lengths are known on the host, so no kernel has to finish first."""

    lengths: tuple[int, ...]
    # ``starts`` as int32, which the CUDA kernels read.
    start_N: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Documents:
        """Documents of these lengths, on the CPU."""
        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of the first token of each document, then the number of tokens."""
        return (0, *accumulate(self.lengths))

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def slices(self) -> Iterator[slice]:
        """The tokens of each document."""
        return (slice(start, end) for start, end in pairwise(self.starts) if end > start)


class Attended(NamedTuple):
    """Output in the dtype of the inputs, and log-sum-exp of the scaled scores in float32 (float64 for float64)."""

    out_THd: Tensor
    lse_HT: Tensor


def forward(query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, documents: Documents, scale: float) -> Attended:
    """Causal attention inside each document. Not differentiable by itself."""
    if query_THd.is_cuda:
        out_THd, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            query_THd, key_TGd, value_TGd, *_cuda_bounds(documents), 0.0, True, False, scale=scale
        )
        return Attended(out_THd, lse_HT)
    out_THd = torch.empty_like(query_THd)
    lse_dtype = torch.float64 if query_THd.dtype == torch.float64 else torch.float32
    lse_HT = query_THd.new_empty(query_THd.shape[1], len(query_THd), dtype=lse_dtype)
    for rows in documents.slices():
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x[rows]) for x in (query_THd, key_TGd, value_TGd)), 0.0, True, scale=scale
        )
        out_THd[rows], lse_HT[:, rows] = _tokens_first(out), lse[0]
    return Attended(out_THd, lse_HT)


def backward(
    grad_THd: Tensor,
    query_THd: Tensor,
    key_TGd: Tensor,
    value_TGd: Tensor,
    attended: Attended,
    documents: Documents,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    ``attended`` may be over more keys than these. The gradients are then those of the part that these keys have in it.
    """
    if query_THd.is_cuda:
        # Without dropout no random state is read.
        unused = torch.empty(2, dtype=torch.uint64, device=query_THd.device)
        return torch.ops.aten._flash_attention_backward(
            grad_THd.contiguous(),
            query_THd,
            key_TGd,
            value_TGd,
            *attended,
            *_cuda_bounds(documents),
            0.0,
            True,
            unused,
            unused,
            scale=scale,
        )
    grads = torch.empty_like(query_THd), torch.empty_like(key_TGd), torch.empty_like(value_TGd)
    for rows in documents.slices():
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x[rows]) for x in (grad_THd, query_THd, key_TGd, value_TGd, attended.out_THd)),
            attended.lse_HT[None, :, rows].contiguous(),
            0.0,
            True,
            scale=scale,
        )
        for grad, part in zip(grads, parts, strict=True):
            grad[rows] = _tokens_first(part)
    return grads


def documents_attention(
    query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, documents: Documents, scale: float
) -> Tensor:
    """Causal attention inside each document, ``[T, H, d]``."""
    return _DocumentsAttention.apply(query_THd, key_TGd, value_TGd, documents, scale)


class _DocumentsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, documents: Documents, scale: float
    ) -> Tensor:
        attended = forward(query_THd, key_TGd, value_TGd, documents, scale)
        ctx.save_for_backward(query_THd, key_TGd, value_TGd, *attended)
        ctx.documents, ctx.scale = documents, scale
        return attended.out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        query_THd, key_TGd, value_TGd, *attended = ctx.saved_tensors
        grads = backward(grad_THd, query_THd, key_TGd, value_TGd, Attended(*attended), ctx.documents, ctx.scale)
        return *grads, None, None


def _cuda_bounds(documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    longest = documents.longest
    return documents.start_N, documents.start_N, longest, longest


def _heads_first(x_THd: Tensor) -> Tensor:
    return x_THd.transpose(0, 1)[None]


def _tokens_first(x_1HTd: Tensor) -> Tensor:
    return x_1HTd[0].transpose(0, 1)
