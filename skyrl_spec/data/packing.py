"""Batches for the workers: rollouts -> train batch -> mini-batches -> shards -> micro-batches.

A row is a whole rollout, padded on the right. ``shard_rows`` and ``micro_batch_rows`` assign rows to ranks and
micro-batches. ``assemble`` is the inverse: it puts results for those rows, such as log-probs, back in batch order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.types import Rollout, TrainBatch


def build_train_batch(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float] | np.ndarray,
    *,
    pad_token_id: int,
    loss_reduction: str,
    max_response_length: int,
) -> TrainBatch:
    """A batch with one row per rollout: its prompt, then its response.

    Advantages (one per rollout) and rollout log-probs are 0 outside the response. The loss mask is that of the rollout.
    ``loss_weights`` treat the batch as a single mini-batch; ``mini_batches`` computes new ones for each mini-batch.
    """
    assert len(rollouts) == len(advantages) > 0
    prompts = [rollout.prompt.token_ids for rollout in rollouts]
    responses = [rollout.generation.token_ids for rollout in rollouts]
    prompt_lengths_B = np.array([len(ids) for ids in prompts])
    lengths_B = prompt_lengths_B + np.array([len(ids) for ids in responses])
    positions_S = np.arange(lengths_B.max())
    is_token_BS = positions_S < lengths_B[:, None]
    is_response_BS = is_token_BS & (positions_S >= prompt_lengths_B[:, None])

    token_ids_BS = np.full(is_token_BS.shape, pad_token_id, np.int64)
    token_ids_BS[is_token_BS] = _flat(chain.from_iterable(zip(prompts, responses, strict=True)), np.int64)
    loss_mask_BS = np.zeros(is_token_BS.shape, bool)
    loss_mask_BS[is_response_BS] = _flat((rollout.loss_mask for rollout in rollouts), bool)
    rollout_logprobs_BS = np.zeros(is_token_BS.shape, np.float32)
    rollout_logprobs_BS[is_response_BS] = _flat((rollout.generation.logprobs for rollout in rollouts), np.float32)
    advantages_BS = np.where(is_response_BS, np.asarray(advantages, np.float32)[:, None], np.float32(0))
    return TrainBatch(
        token_ids=token_ids_BS,
        segment_ids=is_token_BS.astype(np.int64),
        loss_mask=loss_mask_BS,
        loss_weights=token_weights(loss_mask_BS, loss_reduction, max_response_length),
        advantages=advantages_BS,
        rollout_logprobs=rollout_logprobs_BS,
    )


def mini_batches(
    batch: TrainBatch, rows_per_mini_batch: int, *, loss_reduction: str, max_response_length: int
) -> Iterator[TrainBatch]:
    """Mini-batches of consecutive rows, one per optimizer step. Each has its own denominator in ``loss_weights``."""
    for start in range(0, len(batch), rows_per_mini_batch):
        mini_batch = batch.select(slice(start, start + rows_per_mini_batch))
        weights = token_weights(mini_batch.loss_mask, loss_reduction, max_response_length)
        yield replace(mini_batch, loss_weights=weights)


def shard_rows(batch: TrainBatch, dp_size: int) -> list[np.ndarray]:
    """Row numbers of each data-parallel rank. Rows are dealt by length, so that ranks get similar numbers of tokens."""
    longest_first = np.argsort(-_lengths(batch), kind="stable")
    return [longest_first[rank::dp_size] for rank in range(dp_size)]


def shard(batch: TrainBatch, dp_rank: int, dp_size: int) -> TrainBatch:
    """The rows of a rank. A rank without rows gets a row of padding, so that it takes part in every collective."""
    rows = shard_rows(batch, dp_size)[dp_rank]
    return batch.select(rows) if len(rows) else _padding_row(batch)


def micro_batch_rows(batch: TrainBatch, rows: int) -> list[np.ndarray]:
    """Row numbers of the micro-batches: similar lengths together, longest first, so that memory peaks at the start."""
    longest_first = np.argsort(-_lengths(batch), kind="stable")
    return [longest_first[start : start + rows] for start in range(0, len(batch), rows)]


def micro_batches(batch: TrainBatch, rows: int) -> list[TrainBatch]:
    """Micro-batches of at most ``rows`` rows, each cut to its longest row."""
    return [batch.select(row_numbers) for row_numbers in micro_batch_rows(batch, rows)]


def assemble(parts: Sequence[np.ndarray], rows: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The array of ``shape`` ``[B, S]`` whose rows ``rows[i]`` are ``parts[i]``, filled with 0 on the right."""
    out_BS = np.zeros(shape, np.float32)
    for part, part_rows in zip(parts, rows, strict=True):
        # A rank without rows returns a result for its row of padding.
        out_BS[part_rows, : part.shape[1]] = part[: len(part_rows)]
    return out_BS


def gather_shards(batch: TrainBatch, shards: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Results ``[B, S]`` in the order of ``batch``, from the results of each data-parallel rank for its ``shard``."""
    rows = shard_rows(batch, len(shards))
    return {name: assemble([part[name] for part in shards], rows, batch.token_ids.shape) for name in shards[0]}


def _lengths(batch: TrainBatch) -> np.ndarray:
    return (batch.segment_ids > 0).sum(axis=1)


def _padding_row(batch: TrainBatch) -> TrainBatch:
    row = batch.select(slice(0, 1))
    cleared = {name: np.zeros_like(value) for name, value in row.__dict__.items() if value is not None}
    return replace(row, **cleared)


def _flat(rows: Iterable[Sequence[float]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)
