"""Rows for the trainer's forward pass over an engine's proposals: the trainer's side of the sync canary.

Every drafted block becomes a row: the tokens up to its anchor, then the drafted tokens. A draft that reads its own
drafted tokens saw these, not the sampled ones. The responses become rows for the policy. See ``sync.canary``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.drafts.base import BatchTokens
from skyrl_spec.models.policy import document_mask
from skyrl_spec.types import Proposals, TrainBatch


@dataclass(frozen=True)
class BlockRows:
    """R rows, each with the K tokens drafted after its anchor."""

    targets: BatchTokens
    anchor_R: Tensor
    drafted_RK: Tensor


def block_rows(
    proposals: Sequence[Proposals], num_positions: int, rows_at_a_time: int, device: torch.device
) -> list[BlockRows]:
    """Rows of all blocks, ``rows_at_a_time`` of them in a micro-batch.

    The draft computes ``num_positions`` drafted tokens. The engine's blocks may be longer, which are cut, or shorter.
    """
    blocks = [
        (item.prompt_ids + item.generation.token_ids, anchor, drafted)
        for item in proposals
        for anchor, drafted in zip(item.anchors, item.drafted, strict=True)
    ]
    # The draft reads num_positions tokens after the anchor. Its results beyond the engine's tokens are not used.
    padding = [0] * num_positions
    micro_batches = [blocks[start : start + rows_at_a_time] for start in range(0, len(blocks), rows_at_a_time)]
    return [
        BlockRows(
            _targets([tokens[: anchor + 1] + drafted + padding for tokens, anchor, drafted in rows], device),
            torch.tensor([anchor for _, anchor, _ in rows], device=device),
            torch.tensor([drafted[:num_positions] for _, _, drafted in rows], device=device),
        )
        for rows in micro_batches
    ]


def response_batch(proposals: Sequence[Proposals]) -> TrainBatch:
    """Responses with their prompts, one per row. Advantages, loss weights and rollout log-probs are 0."""
    token_ids, segment_ids = _rows([item.prompt_ids + item.generation.token_ids for item in proposals])
    zeros = np.zeros(token_ids.shape, np.float32)
    prompt_lengths = np.array([len(item.prompt_ids) for item in proposals])
    in_response = np.arange(token_ids.shape[1]) >= prompt_lengths[:, None]
    return TrainBatch(token_ids, segment_ids, in_response & (segment_ids > 0), zeros, zeros, zeros)


def _targets(rows: Sequence[list[int]], device: torch.device) -> BatchTokens:
    token_ids, segment_ids = (torch.as_tensor(array, device=device) for array in _rows(rows))
    return BatchTokens(token_ids, segment_ids, segment_ids > 0, document_mask(segment_ids))


def _rows(rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and document ids of ``rows``, padded on the right."""
    token_ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    segment_ids = np.zeros_like(token_ids)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)], segment_ids[index, : len(row)] = row, 1
    return token_ids, segment_ids
