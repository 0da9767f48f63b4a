"""Flash attention over documents laid end to end, with the log-sum-exp of its scores. Memory is linear in tokens.

``documents_attention`` is the whole operation, and ``suffix_attention`` its last rows. ``forward`` and ``backward`` are
the halves of both, for an attention that merges further keys into the softmax: the gradient of a softmax over two sets
of keys is, for each set, that of a softmax over this set alone if output and log-sum-exp are those over both.

Shapes: T tokens of all documents, Q queries, H query heads, G key heads (a divisor of H), d head size.
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


def forward(
    query_QHd: Tensor, key_TGd: Tensor, value_TGd: Tensor, documents: Documents, scale: float, queries: Documents
) -> Attended:
    """Causal attention inside each document. Not differentiable by itself.

    Args:
        documents: documents of the keys.
        queries: documents of the queries. Those of a document are its last tokens: all of them, or fewer.
    """
    if _has_flash_kernel(query_QHd):
        out_QHd, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(
            query_QHd, key_TGd, value_TGd, *_cuda_bounds(queries, documents), 0.0, True, False, scale=scale
        )
        return Attended(out_QHd, lse_HQ)
    out_QHd = torch.empty_like(query_QHd)
    lse_dtype = torch.float64 if query_QHd.dtype == torch.float64 else torch.float32
    lse_HQ = query_QHd.new_empty(query_QHd.shape[1], len(query_QHd), dtype=lse_dtype)
    for rows, before, own in _parts(queries, documents):
        attended = _forward_of_one(query_QHd[rows], key_TGd[own], value_TGd[own], scale, is_causal=True)
        if before.start < before.stop:
            earlier = _forward_of_one(query_QHd[rows], key_TGd[before], value_TGd[before], scale, is_causal=False)
            attended = merged(attended, earlier)
        out_QHd[rows], lse_HQ[:, rows] = attended
    return Attended(out_QHd, lse_HQ)


def backward(
    grad_QHd: Tensor,
    query_QHd: Tensor,
    key_TGd: Tensor,
    value_TGd: Tensor,
    attended: Attended,
    documents: Documents,
    scale: float,
    queries: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    ``attended`` may be over more keys than these. The gradients are then those of the part that these keys have in it.
    """
    if _has_flash_kernel(query_QHd):
        # Without dropout no random state is read.
        unused = torch.empty(2, dtype=torch.uint64, device=query_QHd.device)
        return torch.ops.aten._flash_attention_backward(
            grad_QHd.contiguous(),
            query_QHd,
            key_TGd,
            value_TGd,
            *attended,
            *_cuda_bounds(queries, documents),
            0.0,
            True,
            unused,
            unused,
            scale=scale,
        )
    query_grad, key_grad, value_grad = (
        torch.empty_like(query_QHd),
        torch.empty_like(key_TGd),
        torch.empty_like(value_TGd),
    )
    for rows, before, own in _parts(queries, documents):
        some = grad_QHd[rows], query_QHd[rows]
        both = Attended(attended.out_THd[rows], attended.lse_HT[:, rows].contiguous())
        query_grad[rows], key_grad[own], value_grad[own] = _backward_of_one(
            *some, key_TGd[own], value_TGd[own], both, scale, is_causal=True
        )
        if before.start < before.stop:
            earlier, key_grad[before], value_grad[before] = _backward_of_one(
                *some, key_TGd[before], value_TGd[before], both, scale, is_causal=False
            )
            query_grad[rows] += earlier
    return query_grad, key_grad, value_grad


def documents_attention(
    query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, documents: Documents, scale: float
) -> Tensor:
    """Causal attention inside each document, ``[T, H, d]``."""
    return suffix_attention(query_THd, key_TGd, value_TGd, documents, scale, documents)


def suffix_attention(
    query_QHd: Tensor, key_TGd: Tensor, value_TGd: Tensor, documents: Documents, scale: float, queries: Documents
) -> Tensor:
    """``documents_attention`` of the last tokens of each document (``forward``), ``[Q, H, d]``."""
    return _DocumentsAttention.apply(query_QHd, key_TGd, value_TGd, documents, scale, queries)


class _DocumentsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QHd: Tensor,
        key_TGd: Tensor,
        value_TGd: Tensor,
        documents: Documents,
        scale: float,
        queries: Documents,
    ) -> Tensor:
        attended = forward(query_QHd, key_TGd, value_TGd, documents, scale, queries)
        ctx.save_for_backward(query_QHd, key_TGd, value_TGd, *attended)
        ctx.documents, ctx.scale, ctx.queries = documents, scale, queries
        return attended.out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHd: Tensor) -> tuple[Tensor | None, ...]:
        query_QHd, key_TGd, value_TGd, *attended = ctx.saved_tensors
        grads = backward(
            grad_QHd, query_QHd, key_TGd, value_TGd, Attended(*attended), ctx.documents, ctx.scale, ctx.queries
        )
        return *grads, None, None, None


def _has_flash_kernel(tensor: Tensor) -> bool:
    """A kernel takes all documents at once. Without one, in float32 or on a CPU, they go one after the other."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _cuda_bounds(queries: Documents, documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    return queries.start_N, documents.start_N, queries.longest, documents.longest


def _parts(queries: Documents, documents: Documents) -> Iterator[tuple[slice, slice, slice]]:
    """For each document, its queries, the keys before all of them, and the keys of the same tokens as the queries."""
    for (first, last), (start, end) in zip(pairwise(queries.starts), pairwise(documents.starts), strict=True):
        if last > first:
            middle = end - (last - first)
            yield slice(first, last), slice(start, middle), slice(middle, end)


def _forward_of_one(
    query_QHd: Tensor, key_NGd: Tensor, value_NGd: Tensor, scale: float, *, is_causal: bool
) -> Attended:
    if query_QHd.is_cuda:
        return _float32_forward(query_QHd, key_NGd, value_NGd, scale, is_causal=is_causal)
    attended = cpu_forward(query_QHd[None], key_NGd[None], value_NGd[None], scale, is_causal=is_causal)
    return Attended(attended.out_THd[0], attended.lse_HT[0])


def _backward_of_one(
    grad_QHd: Tensor,
    query_QHd: Tensor,
    key_NGd: Tensor,
    value_NGd: Tensor,
    attended: Attended,
    scale: float,
    *,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    if query_QHd.is_cuda:
        return _float32_backward(grad_QHd, query_QHd, key_NGd, value_NGd, attended, scale, is_causal=is_causal)
    both = Attended(attended.out_THd[None], attended.lse_HT[None])
    grads = cpu_backward(
        grad_QHd[None], query_QHd[None], key_NGd[None], value_NGd[None], both, scale, is_causal=is_causal
    )
    return tuple(grad[0] for grad in grads)


def cpu_forward(
    query_BQHd: Tensor,
    key_BNGd: Tensor,
    value_BNGd: Tensor,
    scale: float,
    *,
    is_causal: bool = False,
    mask_QN: Tensor | None = None,
) -> Attended:
    """Attention of B sets of queries, each over its own keys, on a CPU: ``[B, Q, H, d]`` and ``[B, H, Q]``.

    Args:
        mask_QN: added to the scores, in the dtype of the query. A query that sees no key has output 0, and the
            log-sum-exp that the kernel happens to write.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (query_BQHd, key_BNGd, value_BNGd)), 0.0, is_causal, attn_mask=mask_QN, scale=scale
    )
    return Attended(out.transpose(1, 2), lse)


def cpu_backward(
    grad_BQHd: Tensor,
    query_BQHd: Tensor,
    key_BNGd: Tensor,
    value_BNGd: Tensor,
    attended: Attended,
    scale: float,
    *,
    is_causal: bool = False,
    mask_QN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of ``cpu_forward``. ``attended`` may be over more keys (``backward``)."""
    tensors = (grad_BQHd, query_BQHd, key_BNGd, value_BNGd, attended.out_THd)
    query_grad, key_grad, value_grad = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in tensors), attended.lse_HT, 0.0, is_causal, attn_mask=mask_QN, scale=scale
    )
    return query_grad.transpose(1, 2), key_grad.transpose(1, 2), value_grad.transpose(1, 2)


def _float32_forward(
    query_QHd: Tensor, key_NGd: Tensor, value_NGd: Tensor, scale: float, *, is_causal: bool
) -> Attended:
    """On CUDA, where flash attention has no float32."""
    key_NHd, value_NHd = (_for_every_head(x, query_QHd) for x in (key_NGd, value_NGd))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *(_heads_first(x) for x in (query_QHd, key_NHd, value_NHd)), None, True, 0.0, is_causal, scale=scale
    )
    return Attended(_tokens_first(out), lse[0, :, : len(query_QHd)])


def _float32_backward(
    grad_QHd: Tensor,
    query_QHd: Tensor,
    key_NGd: Tensor,
    value_NGd: Tensor,
    attended: Attended,
    scale: float,
    *,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    key_NHd, value_NHd = (_for_every_head(x, query_QHd) for x in (key_NGd, value_NGd))
    # As the forward kernel pads it.
    lse_HP = torch.nn.functional.pad(attended.lse_HT, (0, -len(query_QHd) % 32), value=torch.inf)
    # Without dropout no random state is read.
    unused = torch.zeros((), dtype=torch.int64)
    query_grad, *grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *(_heads_first(x) for x in (grad_QHd, query_QHd, key_NHd, value_NHd)),
        None,
        _heads_first(attended.out_THd),
        lse_HP[None],
        unused,
        unused,
        0.0,
        [True, True, True, False],
        is_causal,
        scale=scale,
    )[:3]
    num_key_heads = key_NGd.shape[1]
    return _tokens_first(query_grad), *(_tokens_first(x).unflatten(1, (num_key_heads, -1)).sum(2) for x in grads)


def _for_every_head(x_NGd: Tensor, query_QHd: Tensor) -> Tensor:
    return x_NGd.repeat_interleave(query_QHd.shape[1] // x_NGd.shape[1], dim=1)


def merged(a: Attended, b: Attended) -> Attended:
    """Attention over two sets of keys, from the attention over each. A log-sum-exp of one may be -inf."""
    lse_HT = torch.logaddexp(a.lse_HT, b.lse_HT)
    shares = ((part.lse_HT - lse_HT).exp().t()[..., None] * part.out_THd for part in (a, b))
    return Attended(sum(shares, lse_HT.new_zeros(())).to(a.out_THd.dtype), lse_HT)


def _heads_first(x_THd: Tensor) -> Tensor:
    return x_THd.transpose(0, 1)[None]


def _tokens_first(x_1HTd: Tensor) -> Tensor:
    return x_1HTd[0].transpose(0, 1)
