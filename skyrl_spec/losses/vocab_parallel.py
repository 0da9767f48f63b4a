"""A softmax over a vocabulary that is sharded over tensor-parallel ranks, for a chunk of tokens at a time.

Shape suffixes: c tokens of one chunk, D hidden, v this rank's tokens of the vocabulary (padding already cut off),
R ranks of the group, N numbers exchanged a token.

A rank reduces its own columns first; the ranks then exchange a few numbers a token (``all_gather_columns``), and every
rank combines them (``Normaliser``). So a softmax costs one collective, and none without a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """The rows of the output weight that are tokens of this rank; ``start`` is the id of the first.

    A wholly padded shard keeps one row, whose logits are the lowest number there is: it never wins a maximum and gets
    probability 0, and nothing else has to know of empty shards.
    """

    weight_vD: Tensor
    start: int
    rank: int
    is_padding: bool
    group: ProcessGroup | None
    # Logits are computed in float32 from a shorter dtype, not rounded to it first.
    fp32_logits: bool

    def to_local(self, ids_c: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each global id (any column where it is another rank's) and whether it is this rank's."""
        columns_c = ids_c - self.start
        mine_c = (columns_c >= 0) & (columns_c < len(self.weight_vD))
        return columns_c.clamp(0, len(self.weight_vD) - 1), mine_c

    def to_global(self, columns_c: Tensor, dtype: torch.dtype) -> Tensor:
        """Ids as floats, to travel with other numbers: exact below 2^24."""
        return columns_c.to(dtype) + self.start


def vocab_shard(
    output_weight_vD: Tensor, vocab_size: int, group: ProcessGroup | None, fp32_logits: bool = False
) -> VocabShard:
    """This rank's shard: rank r of ``group`` holds rows [r v, (r + 1) v) of the padded weight.

    Rows from ``vocab_size`` on are padding.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    num_rows = len(output_weight_vD)
    assert vocab_size <= size * num_rows, "the shards hold fewer rows than the vocabulary has tokens"
    num_tokens = min(max(vocab_size - rank * num_rows, 0), num_rows)
    return VocabShard(
        weight_vD=output_weight_vD.detach()[: max(num_tokens, 1)],
        start=rank * num_rows,
        rank=rank,
        is_padding=num_tokens == 0,
        group=group if size > 1 else None,
        fp32_logits=fp32_logits,
    )


class ChunkLogits:
    """Makes the logits of one chunk of tokens, in memory that every chunk uses again.

    Matrix products run in the dtype of the weight, everything else in float32 (float64 if the weight is). With
    ``shard.fp32_logits`` the product that makes the logits yields float32: CUDA kernels sum in float32 and skip the
    rounding; a CPU has no such kernel and multiplies float32 copies of both operands (4 bytes a weight of the shard).
    """

    def __init__(self, shard: VocabShard, chunk_size: int, temperature: float) -> None:
        assert temperature > 0, "a distribution at temperature 0 has no gradient"
        self.shard = shard
        self.temperature = temperature
        self.shape = (chunk_size, len(shard.weight_vD))
        self.dtype = compute_dtype(shard.weight_vD)
        # Operands of matrix products in the dtype of the weight; None if the buffers have it.
        self.staging_cv = None if self.dtype == shard.weight_vD.dtype else shard.weight_vD.new_empty(self.shape)
        is_wide = shard.fp32_logits and self.staging_cv is not None
        self.is_wide_on_cuda = is_wide and shard.weight_vD.is_cuda
        self.wide_weight_vD = shard.weight_vD.float() if is_wide and not shard.weight_vD.is_cuda else None

    def buffer(self) -> Tensor:
        return self.shard.weight_vD.new_empty(self.shape, dtype=self.dtype)

    def write(self, hidden_cD: Tensor, buffer_cv: Tensor) -> Tensor:
        """``hidden @ W^T / temperature``, in the first rows of the buffer."""
        logits_cv = buffer_cv[: len(hidden_cD)]
        if self.staging_cv is None:
            torch.mm(hidden_cD, self.shard.weight_vD.t(), out=logits_cv)
        elif self.is_wide_on_cuda:
            torch.mm(hidden_cD, self.shard.weight_vD.t(), out_dtype=torch.float32, out=logits_cv)
        elif self.wide_weight_vD is not None:
            torch.mm(hidden_cD.float(), self.wide_weight_vD.t(), out=logits_cv)
        else:
            logits_cv.copy_(torch.mm(hidden_cD, self.shard.weight_vD.t(), out=self.staging_cv[: len(hidden_cD)]))
        if self.temperature != 1.0:
            logits_cv.div_(self.temperature)
        if self.shard.is_padding:
            logits_cv.fill_(torch.finfo(self.dtype).min)
        return logits_cv

    def operand(self, values_cv: Tensor) -> Tensor:
        """The values in the dtype of the weight, for a matrix product; until the next call of any method."""
        return values_cv if self.staging_cv is None else self.staging_cv[: len(values_cv)].copy_(values_cv)


@dataclass(frozen=True)
class Normaliser:
    """The softmax denominators of a chunk, from every rank's maximum and its sum of ``exp(logits - maximum)``."""

    max_c: Tensor
    log_sum_c: Tensor  # log of the sum of exp(logits - max)
    share_Rc: Tensor  # a rank's exp(logits - its own maximum) times its share is the softmax
    winner_c: Tensor  # the rank that has the maximum; the first where several have it, so that the lowest id wins

    @classmethod
    def combine(cls, max_Rc: Tensor, sum_Rc: Tensor) -> Normaliser:
        max_c, winner_c = max_Rc.max(0)
        scale_Rc = (max_Rc - max_c).exp()
        sum_c = (scale_Rc * sum_Rc).sum(0)
        return cls(max_c, sum_c.log(), scale_Rc / sum_c, winner_c)

    @property
    def lse_c(self) -> Tensor:
        return self.max_c + self.log_sum_c

    def of_winner(self, values_Rc: Tensor) -> Tensor:
        return values_Rc.gather(0, self.winner_c[None])[0]


def all_gather_columns(columns: list[Tensor], group: ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each [c, ...] tensor as [R, c, ...], all ranks' together, in one collective that every rank must reach."""
    mine_Nc = torch.stack(columns)
    if group is None:
        return mine_Nc.unsqueeze(1).unbind(0)
    all_RNc = mine_Nc.new_empty(group.size(), *mine_Nc.shape)
    dist.all_gather(list(all_RNc), mine_Nc, group=group)
    return all_RNc.unbind(1)


def exp_minus_max_(logits_cv: Tensor, max_c: Tensor) -> Tensor:
    """Overwrites the logits with ``exp(logits - max)`` and returns its row sums."""
    return logits_cv.sub_(max_c[:, None]).exp_().sum(-1)


def softmax_(logits_cv: Tensor, shard: VocabShard) -> Tensor:
    """Overwrites the logits with their softmax over all ranks' columns; returns its argmax ids [c]. One collective."""
    max_c, column_c = logits_cv.max(-1)
    sum_c = exp_minus_max_(logits_cv, max_c)
    max_Rc, sum_Rc, argmax_Rc = all_gather_columns([max_c, sum_c, shard.to_global(column_c, max_c.dtype)], shard.group)
    normaliser = Normaliser.combine(max_Rc, sum_Rc)
    logits_cv.mul_(normaliser.share_Rc[shard.rank][:, None])
    return normaliser.of_winner(argmax_Rc)


def nonzero_chunks(values_T: Tensor, chunk_size: int) -> list[Tensor]:
    """The positions whose value is not 0, ``chunk_size`` at a time."""
    positions_N = values_T.nonzero().squeeze(1)
    return [positions_N[start : start + chunk_size] for start in range(0, len(positions_N), chunk_size)]


def row_dot(a_cv: Tensor, b_cv: Tensor) -> Tensor:
    """Row-wise dot products without a product as large as the chunk, and without the TF32 a matrix product may use."""
    return torch.cat([(a * b).sum(-1) for a, b in zip(a_cv.chunk(8), b_cv.chunk(8), strict=True)])


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
