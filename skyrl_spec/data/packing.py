"""Batches for the workers: rollouts -> train batch -> mini-batches -> shards -> packs.

A row of a batch is a document: a whole rollout, padded on the right only while it travels. ``shard_rows`` assigns rows
to ranks, ``pack_rows`` to micro-batches. There they are laid end to end, without padding (``models.pack``).
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
    experts = tuple(rollout.generation.experts for rollout in rollouts)
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
        lengths=lengths_B,
        loss_mask=loss_mask_BS,
        loss_weights=token_weights(loss_mask_BS, loss_reduction, max_response_length),
        advantages=advantages_BS,
        rollout_logprobs=rollout_logprobs_BS,
        experts=None if all(one is None for one in experts) else experts,
    )


def mini_batches(
    batch: TrainBatch, rows_per_mini_batch: int, *, loss_reduction: str, max_response_length: int
) -> Iterator[TrainBatch]:
    """Mini-batches of consecutive rows, one per optimizer step. Each has its own denominator in ``loss_weights``."""
    for start in range(0, len(batch), rows_per_mini_batch):
        mini_batch = batch.select(slice(start, start + rows_per_mini_batch))
        weights = token_weights(mini_batch.loss_mask, loss_reduction, max_response_length)
        yield replace(mini_batch, loss_weights=weights)


# Tokens at which a document's attention costs as much as all else: twelve times the width of a model, here 4,096.
_ATTENTION_EQUALS_REST = 12 * 4096


def shard_rows(lengths_B: np.ndarray, num_shards: int) -> list[np.ndarray]:
    """Row numbers of each data-parallel rank, ascending. The longest rows go first, each to the rank with least work.

    Work is estimated: a document's tokens, and their square for its attention.
    """
    costs_B = lengths_B * (1.0 + lengths_B / _ATTENTION_EQUALS_REST)
    loads, shards = np.zeros(num_shards), [[] for _ in range(num_shards)]  # type: ignore[var-annotated]
    for row in np.argsort(-costs_B, kind="stable"):
        rank = int(loads.argmin())
        loads[rank] += costs_B[row]
        shards[rank].append(row)
    return [np.sort(np.array(rows, np.int64)) for rows in shards]


def pack_rows(sizes_B: np.ndarray, budget: int) -> list[np.ndarray]:
    """Indices of the documents of each pack, ascending, so that their sizes add up to at most ``budget``.

    First-fit-decreasing: the largest document goes first, each into the first pack with room for it. A document that is
    larger than the budget has a pack to itself. Memory peaks in the first pack.
    """
    packs: list[list[int]] = []
    room = np.zeros(len(sizes_B), np.int64)
    for index in np.argsort(-sizes_B, kind="stable"):
        fits = room[: len(packs)] >= sizes_B[index]
        place = int(fits.argmax()) if fits.any() else len(packs)
        if place == len(packs):
            packs.append([])
            room[place] = budget
        packs[place].append(int(index))
        room[place] -= sizes_B[index]
    return [np.sort(np.array(pack, np.int64)) for pack in packs]


def gather_shards(batch: TrainBatch, shards: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Results ``[B, S]`` in the order of ``batch``, from those of each data-parallel rank for its ``shard_rows``."""
    gathered = {name: np.zeros(batch.token_ids.shape, np.float32) for name in shards[0]}
    for rows, shard in zip(shard_rows(batch.lengths, len(shards)), shards, strict=True):
        for name, values in shard.items():
            gathered[name][rows] = values
    return gathered


def _flat(rows: Iterable[Sequence[float]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)
