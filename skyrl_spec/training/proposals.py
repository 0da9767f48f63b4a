"""An engine's proposals as rows for the trainer's forward pass: its side of the sync canary (``sync.canary``).

Every block becomes a row of its own, the tokens up to its anchor and the drafted ones behind them, because a draft that
feeds on its own tokens saw those and not the sampled ones. The responses are rows too, for the policy.
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
    """R rows that end in K drafted tokens each."""

    targets: BatchTokens
    anchor_R: Tensor
    drafted_RK: Tensor


def block_rows(
    proposals: Sequence[Proposals], num_positions: int, rows_at_a_time: int, device: torch.device
) -> list[BlockRows]:
    """All blocks, for a draft that drafts ``num_positions`` tokens; the engine's may be longer or shorter."""
    blocks = [
        (item.prompt_ids + item.generation.token_ids, anchor, drafted)
        for item in proposals
        for anchor, drafted in zip(item.anchors, item.drafted, strict=True)
    ]
    # What the draft computes beyond the engine's tokens is not looked at, but it reads that many.
    padding = [0] * num_positions
    parts = [blocks[start : start + rows_at_a_time] for start in range(0, len(blocks), rows_at_a_time)]
    return [
        BlockRows(
            _targets([tokens[: anchor + 1] + drafted + padding for tokens, anchor, drafted in part], device),
            torch.tensor([anchor for _, anchor, _ in part], device=device),
            torch.tensor([drafted[:num_positions] for _, _, drafted in part], device=device),
        )
        for part in parts
    ]


def response_batch(proposals: Sequence[Proposals]) -> TrainBatch:
    """The responses with their prompts, a row each; advantages and weights are 0."""
    token_ids, segment_ids = _rows([item.prompt_ids + item.generation.token_ids for item in proposals])
    zeros = np.zeros(token_ids.shape, np.float32)
    prompt_lengths = np.array([len(item.prompt_ids) for item in proposals])
    in_response = np.arange(token_ids.shape[1]) >= prompt_lengths[:, None]
    return TrainBatch(token_ids, segment_ids, in_response & (segment_ids > 0), zeros, zeros, zeros)


def _targets(rows: Sequence[list[int]], device: torch.device) -> BatchTokens:
    token_ids, segment_ids = (torch.as_tensor(array, device=device) for array in _rows(rows))
    return BatchTokens(token_ids, segment_ids, segment_ids > 0, document_mask(segment_ids))


def _rows(rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token and document ids, padded on the right."""
    token_ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    segment_ids = np.zeros_like(token_ids)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)], segment_ids[index, : len(row)] = row, 1
    return token_ids, segment_ids
