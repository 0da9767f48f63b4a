"""Softmax over a vocabulary that is sharded over tensor-parallel ranks, one chunk of tokens at a time.

A rank reduces its own columns first. The ranks then exchange a few numbers per token (``all_gather_columns``), and
every rank combines them (``Normaliser``). A softmax costs one collective, or none without a group.

Shape suffixes: c tokens of one chunk, D hidden, v this rank's tokens of the vocabulary (padding removed), R ranks of
the group, N numbers exchanged per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.distributed import ProcessGroup

from skyrl_spec.errors import ConfigError


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the output weight that belong to tokens.

    A shard that is all padding keeps one row, and its logits are the lowest finite number. That row never wins a
    maximum and has probability 0, so no other code handles empty shards.
    """

    weight_vD: Tensor
    # Token id of the first row.
    start: int
    rank: int
    # The shard holds no token.
    is_padding: bool
    group: ProcessGroup | None
    # See ``ChunkLogits``.
    fp32_logits: bool

    def to_local(self, ids_c: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each token id, and whether this rank holds the id (if not, the column is arbitrary)."""
        columns_c = ids_c - self.start
        is_local_c = (columns_c >= 0) & (columns_c < len(self.weight_vD))
        return columns_c.clamp(0, len(self.weight_vD) - 1), is_local_c

    def to_global(self, columns_c: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids as floats, so that they share a collective with other numbers. Exact below 2^24."""
        return columns_c.to(dtype) + self.start


def vocab_shard(
    output_weight_vD: Tensor, vocab_size: int, group: ProcessGroup | None, fp32_logits: bool = False
) -> VocabShard:
    """This rank's shard. Rank r of ``group`` holds rows [r v, (r + 1) v) of the padded weight.

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


def require_float32_product(matrix_product: OpOverloadPacket = torch.ops.aten.mm) -> None:
    """Checks that ``matrix_product`` takes an ``out_dtype``, as ``torch.mm`` does since torch 2.8.

    Raises:
        ConfigError: it does not.
    """
    if "dtype_out" not in matrix_product.overloads():
        raise ConfigError(
            f"trainer.policy.megatron_config.fp32_output_head=true: torch {torch.__version__} has no "
            f"{matrix_product.__name__} with out_dtype; install torch 2.8 or newer, or set it to false"
        )


class ChunkLogits:
    """Logits of one chunk of tokens at a time, in memory that all chunks share.

    Matrix products run in the dtype of the weight. All other arithmetic runs in float32, or in float64 if the weight
    is float64.

    With bf16 weights the logits are rounded to bf16 by default, an error of up to 0.06 where |logit| is 16 to 32. With
    ``shard.fp32_logits`` they are float32 from bf16 operands and are never rounded:

    - CUDA: the matrix product writes its float32 accumulator (``out_dtype``). No additional memory.
    - CPU: no such kernel exists. The product runs on float32 copies of the chunk's hidden states and of the weight
      shard. The copy of the shard (4 v D bytes) exists as long as this object.
    """

    def __init__(self, shard: VocabShard, chunk_size: int, temperature: float) -> None:
        assert temperature > 0, "a distribution at temperature 0 has no gradient"
        self.shard = shard
        self.temperature = temperature
        self.shape = (chunk_size, len(shard.weight_vD))
        self.dtype = compute_dtype(shard.weight_vD)
        # Operands of matrix products in the dtype of the weight; None if the buffers have that dtype.
        self.staging_cv = None if self.dtype == shard.weight_vD.dtype else shard.weight_vD.new_empty(self.shape)
        self.has_float32_product = shard.fp32_logits and self.staging_cv is not None
        self.float32_weight_vD: Tensor | None = None
        if self.has_float32_product and shard.weight_vD.is_cuda:
            require_float32_product()
        elif self.has_float32_product:
            self.float32_weight_vD = shard.weight_vD.float()

    def buffer(self) -> Tensor:
        """Uninitialized memory for the logits of one chunk."""
        return self.shard.weight_vD.new_empty(self.shape, dtype=self.dtype)

    def write(self, hidden_cD: Tensor, buffer_cv: Tensor) -> Tensor:
        """``hidden @ W^T / temperature``, written to the first rows of the buffer."""
        logits_cv = buffer_cv[: len(hidden_cD)]
        self._write_product(hidden_cD, logits_cv)
        if self.temperature != 1.0:
            logits_cv.div_(self.temperature)
        if self.shard.is_padding:
            logits_cv.fill_(torch.finfo(self.dtype).min)
        return logits_cv

    def _write_product(self, hidden_cD: Tensor, logits_cv: Tensor) -> None:
        weight_Dv = self.shard.weight_vD.t()
        if self.staging_cv is None:
            torch.mm(hidden_cD, weight_Dv, out=logits_cv)
        elif self.float32_weight_vD is not None:
            torch.mm(hidden_cD.float(), self.float32_weight_vD.t(), out=logits_cv)
        elif self.has_float32_product:
            torch.mm(hidden_cD, weight_Dv, out_dtype=torch.float32, out=logits_cv)
        else:
            logits_cv.copy_(torch.mm(hidden_cD, weight_Dv, out=self.staging_cv[: len(hidden_cD)]))

    def operand(self, values_cv: Tensor) -> Tensor:
        """The values in the dtype of the weight, for a matrix product. Valid until the next call of any method."""
        return values_cv if self.staging_cv is None else self.staging_cv[: len(values_cv)].copy_(values_cv)


@dataclass(frozen=True)
class Normaliser:
    """Softmax denominators of a chunk."""

    max_c: Tensor
    # log(sum(exp(logits - max)))
    log_sum_c: Tensor
    # softmax = exp(logits - the rank's own maximum) * the rank's share
    share_Rc: Tensor
    # Rank that has the maximum; the first one of several, so that the lowest token id wins.
    winner_c: Tensor

    @classmethod
    def combine(cls, max_Rc: Tensor, sum_Rc: Tensor) -> Normaliser:
        """Denominators from every rank's maximum and its sum of ``exp(logits - maximum)``."""
        max_c, winner_c = max_Rc.max(0)
        scale_Rc = (max_Rc - max_c).exp()
        sum_c = (scale_Rc * sum_Rc).sum(0)
        return cls(max_c, sum_c.log(), scale_Rc / sum_c, winner_c)

    @property
    def lse_c(self) -> Tensor:
        """Log-sum-exp of the logits."""
        return self.max_c + self.log_sum_c

    def of_winner(self, values_Rc: Tensor) -> Tensor:
        """Each token's value from the rank that has its maximum."""
        return values_Rc.gather(0, self.winner_c[None])[0]


def all_gather_columns(columns: list[Tensor], group: ProcessGroup | None) -> tuple[Tensor, ...]:
    """Every [c, ...] tensor of all ranks, as [R, c, ...]. One collective, which every rank must reach."""
    local_Nc = torch.stack(columns)
    if group is None:
        return local_Nc.unsqueeze(1).unbind(0)
    all_RNc = local_Nc.new_empty(group.size(), *local_Nc.shape)
    dist.all_gather(list(all_RNc), local_Nc, group=group)
    return all_RNc.unbind(1)


def exp_minus_max_(logits_cv: Tensor, max_c: Tensor) -> Tensor:
    """Overwrites the logits with ``exp(logits - max)`` and returns its row sums."""
    return logits_cv.sub_(max_c[:, None]).exp_().sum(-1)


def softmax_(logits_cv: Tensor, shard: VocabShard) -> Tensor:
    """Overwrites the logits with their softmax over all ranks and returns the argmax token ids [c]. One collective."""
    max_c, column_c = logits_cv.max(-1)
    sum_c = exp_minus_max_(logits_cv, max_c)
    max_Rc, sum_Rc, argmax_Rc = all_gather_columns([max_c, sum_c, shard.to_global(column_c, max_c.dtype)], shard.group)
    normaliser = Normaliser.combine(max_Rc, sum_Rc)
    logits_cv.mul_(normaliser.share_Rc[shard.rank][:, None])
    return normaliser.of_winner(argmax_Rc)


def counted_chunks(counts_T: Tensor, chunk_size: int) -> list[Tensor | slice]:
    """Positions where ``counts_T`` is True, in chunks of ``chunk_size``.

    On a GPU all positions, so that the host need not wait for their number. Callers make the others count as nothing.
    """
    if not host_knows(counts_T):
        return [slice(start, start + chunk_size) for start in range(0, len(counts_T), chunk_size)]
    positions_N = counts_T.nonzero().squeeze(1)
    return [positions_N[start : start + chunk_size] for start in range(0, len(positions_N), chunk_size)]


def host_knows(tensor: Tensor) -> bool:
    """The host can read the tensor without waiting for a device."""
    return not tensor.is_cuda


def row_dot(a_cv: Tensor, b_cv: Tensor) -> Tensor:
    """Row-wise dot products [c].

    Neither a temporary as large as the chunk nor a matrix product, which may use TF32.
    """
    return torch.cat([(a * b).sum(-1) for a, b in row_blocks(a_cv, b_cv)])


def row_blocks(*chunks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Eighths of tensors with as many rows, so that a temporary is an eighth of a chunk."""
    return zip(*(chunk.chunk(8) for chunk in chunks), strict=True)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of the arithmetic on logits: float64 for a float64 tensor, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
