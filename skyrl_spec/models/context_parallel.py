"""Context parallelism: the ranks of a group divide the tokens of every pack.

A pack is cut into 2 R chunks of equal length. Rank r of R has the chunks r and 2 R - 1 - r ("zigzag"), so that causal
attention over a long document is equal work for all. Token ids, masks and positions stay whole on every rank: labels
and targets are cut from them, so that nothing is ever shifted over the border of a chunk.

Shapes: T tokens of the pack, t = T / R tokens of this rank, c = T / (2 R) tokens of a chunk, H query heads, G key
heads, d head size.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from skyrl_spec.models import flash
from skyrl_spec.models.flash import Attended, Documents
from skyrl_spec.models.pack import Pack, Share, SharedChunk, extended_experts
from skyrl_spec.models.parallel import Parallel


@dataclass(frozen=True)
class ContextRanks:
    """The ranks that divide packs."""

    group: ProcessGroup
    rank: int
    size: int
    # Number of which a rank's tokens are a multiple: sequence parallelism divides them again.
    multiple: int = 1

    @classmethod
    def of(cls, parallel: Parallel, *, is_sequence_parallel: bool) -> ContextRanks | None:
        """None if a pack is not divided."""
        if parallel.cp_size == 1:
            return None
        return cls(
            parallel.cp_group, parallel.cp_rank, parallel.cp_size, parallel.tp_size if is_sequence_parallel else 1
        )

    def divide(self, pack: Pack) -> Pack:
        """``pack``, on the CPU, with this rank's share. Tokens without a loss lengthen the last document if need be."""
        pack = _lengthened(pack, -len(pack.token_ids_T) % (2 * self.size * self.multiple))
        length = len(pack.token_ids_T) // (2 * self.size)
        chunks = (self.rank, 2 * self.size - 1 - self.rank)
        return replace(
            pack,
            share=Share(
                group=self.group,
                rank=self.rank,
                size=self.size,
                chunks=tuple(_chunk(pack.documents, number * length, length) for number in chunks),
            ),
        )


def _lengthened(pack: Pack, num_added: int) -> Pack:
    if num_added == 0:
        return pack
    *others, last = pack.documents.lengths
    added = (0, num_added)
    return replace(
        pack,
        token_ids_T=pad(pack.token_ids_T, added),
        loss_mask_T=pad(pack.loss_mask_T, added),
        segment_ids_T=pad(pack.segment_ids_T, added, value=len(pack.documents.lengths)),
        position_T=torch.cat([pack.position_T, torch.arange(last, last + num_added)]),
        documents=Documents.of([*others, last + num_added]),
        experts_TLk=extended_experts(pack, num_added),
    )


def _chunk(documents: Documents, first: int, length: int) -> SharedChunk:
    """The chunk of ``length`` tokens from ``first``. Keys begin where the document of its first token does."""
    end, begin = first + length, documents.starts[bisect_right(documents.starts, first) - 1]
    starts = [start for start in documents.starts[:-1] if begin <= start < end]
    ends = [*starts[1:], end]
    return SharedChunk(
        tokens=slice(first, end),
        keys=slice(begin, end),
        documents=Documents.of([stop - start for start, stop in zip(starts, ends, strict=True)]),
        queries=Documents.of([stop - max(start, first) for start, stop in zip(starts, ends, strict=True)]),
    )


# ---- Rows of other ranks ---------------------------------------------------------------------------------------------


def gathered(x_t: Tensor, share: Share) -> Tensor:
    """Rows of all ranks in the order of the pack, ``[T, ..]``. Collective.

    The gradient of a rank's rows is the sum of the gradients that all ranks have of them.
    """
    return _Gather.apply(x_t, share)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_t: Tensor, share: Share) -> Tensor:
        ctx.share = share
        return _all_rows(x_t, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_of_own_rows(grad_T, ctx.share), None


def _all_rows(x_t: Tensor, share: Share) -> Tensor:
    parts = x_t.new_empty(share.size * len(x_t), *x_t.shape[1:])
    dist.all_gather_into_tensor(parts, x_t.contiguous(), group=share.group)
    first_Rc, second_Rc = parts.unflatten(0, (share.size, 2, -1)).unbind(1)
    return torch.cat([first_Rc, second_Rc.flip(0)]).flatten(0, 1)


def _sum_of_own_rows(x_T: Tensor, share: Share) -> Tensor:
    """This rank's rows of the sum of all ranks' ``x_T``."""
    first_Rc, second_Rc = x_T.unflatten(0, (2, share.size, -1)).unbind(0)
    by_rank = torch.stack([first_Rc, second_Rc.flip(0)], dim=1).flatten(0, 2)
    own = x_T.new_empty(len(x_T) // share.size, *x_T.shape[1:])
    dist.reduce_scatter_tensor(own, by_rank, group=share.group)
    return own


def sum_over_ranks(x: Tensor, share: Share | None) -> Tensor:
    """Sum of all ranks' ``x``. The ranks compute the same of it, so its gradient is that of every term.

    Collective, unless ``x`` is empty or no ranks share the pack.
    """
    if share is None or x.numel() == 0:
        return x
    return reduce_from_tensor_model_parallel_region(x, group=share.group)


def placed(x_n: Tensor, own_n: Tensor | None, num: int, share: Share | None) -> Tensor:
    """``[.., N]`` on all ranks, from the values ``[.., n]`` that each has of the places ``own_n``. Collective.

    Every place belongs to one rank. Differentiable.
    """
    if own_n is None:
        return x_n
    whole = x_n.new_zeros(*x_n.shape[:-1], num).index_copy(-1, own_n, x_n)
    return sum_over_ranks(whole, share)


@dataclass(frozen=True)
class Reach:
    """Rows of this rank's tokens of a pack, then of the ``num_behind`` tokens behind each of its chunks.

    Without context parallelism a rank has all tokens of the pack, and these are the rows.
    """

    num_behind: int
    # Row of the token at each position of the pack, and of ``num_behind`` behind its end. Meaningless beyond reach.
    row_P: Tensor

    @classmethod
    def of(cls, pack: Pack, num_behind: int) -> Reach:
        """On the CPU."""
        num_tokens, share = len(pack.token_ids_T), pack.share
        if share is None:
            return cls(num_behind, torch.arange(num_tokens + num_behind).clamp(max=num_tokens - 1))
        rows_P, behind = np.zeros(num_tokens + num_behind, np.int64), np.arange(num_behind)
        for number, chunk in enumerate(share.chunks):
            rows_P[chunk.tokens.stop + behind] = pack.num_own + number * num_behind + behind
        # A token behind one chunk may be the other's own.
        rows_P[share.positions] = np.arange(pack.num_own)
        return cls(num_behind, torch.from_numpy(rows_P))

    def rows(self, x_t: Tensor, share: Share | None) -> Tensor:
        """The rows, without gradient of those behind a chunk. Those behind the pack are zero. Collective."""
        if share is None:
            return x_t
        length = len(x_t) // 2
        num_sent = min(self.num_behind, length)
        firsts = torch.cat([x_t[:num_sent], x_t[length : length + num_sent]]).detach()
        of_chunks = torch.cat([_all_rows(firsts, share), x_t.new_zeros(self.num_behind, *x_t.shape[1:])])
        next_chunks = (share.rank + 1, 2 * share.size - share.rank)
        # If a chunk is shorter than what is wanted, the first rows of all chunks are the whole pack.
        behind = [of_chunks[number * num_sent :][: self.num_behind] for number in next_chunks]
        return torch.cat([x_t, *behind])


# ---- Attention -------------------------------------------------------------------------------------------------------


def shared_attention(query_tHd: Tensor, key_tGd: Tensor, value_tGd: Tensor, share: Share, scale: float) -> Tensor:
    """``flash.documents_attention`` over the whole pack, of this rank's queries: ``[t, H, d]``. Collective.

    Keys and values of all ranks exist one layer at a time. The backward pass gathers them again.
    """
    return _SharedAttention.apply(query_tHd, torch.stack([key_tGd, value_tGd], dim=1), share, scale)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_tHd: Tensor, keys_t2Gd: Tensor, share: Share, scale: float) -> Tensor:
        out_tHd = torch.empty_like(query_tHd)
        keys_T2Gd, lses = _all_rows(keys_t2Gd, share), []
        for rows, chunk in zip(share.rows, share.chunks, strict=True):
            key_NGd, value_NGd = keys_T2Gd[chunk.keys].unbind(1)
            attended = flash.forward(query_tHd[rows], key_NGd, value_NGd, chunk.documents, scale, chunk.queries)
            out_tHd[rows] = attended.out_THd
            lses.append(attended.lse_HT)
        ctx.save_for_backward(query_tHd, keys_t2Gd, out_tHd, *lses)
        ctx.share, ctx.scale = share, scale
        return out_tHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tHd: Tensor) -> tuple[Tensor | None, ...]:
        query_tHd, keys_t2Gd, out_tHd, *lses = ctx.saved_tensors
        share: Share = ctx.share
        keys_T2Gd, query_grad = _all_rows(keys_t2Gd, share), torch.empty_like(query_tHd)
        keys_grad = torch.zeros_like(keys_T2Gd)
        for rows, chunk, lse_Hc in zip(share.rows, share.chunks, lses, strict=True):
            key_NGd, value_NGd = keys_T2Gd[chunk.keys].unbind(1)
            query_grad[rows], *grads = flash.backward(
                grad_tHd[rows],
                query_tHd[rows],
                key_NGd,
                value_NGd,
                Attended(out_tHd[rows], lse_Hc),
                chunk.documents,
                ctx.scale,
                chunk.queries,
            )
            keys_grad[chunk.keys] += torch.stack(grads, dim=1)
        return query_grad, _sum_of_own_rows(keys_grad, share), None, None
