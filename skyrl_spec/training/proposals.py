"""Packs for the trainer's forward pass over an engine's proposals: the trainer's side of the sync canary.

Every drafted block becomes a document: the tokens up to its anchor, then the drafted tokens. A draft that reads its own
drafted tokens saw these, not the sampled ones. The responses become documents for the policy. See ``sync.canary``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.drafts.base import Draft, Teacher
from skyrl_spec.losses.logprobs import vocab_parallel_argmax, vocab_parallel_logprobs
from skyrl_spec.models.capture import CapturePoint
from skyrl_spec.models.context_parallel import ContextRanks
from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.types import Proposals, TrainBatch


@dataclass(frozen=True)
class BlockPack:
    """A documents, each with the K tokens drafted after its anchor."""

    pack: Pack
    # Indices in the pack, for the host.
    anchors: tuple[int, ...]
    drafted_AK: Tensor


def block_packs(
    proposals: Sequence[Proposals], num_positions: int, budget: int, context: ContextRanks | None = None
) -> Iterator[BlockPack]:
    """All blocks in their order, in packs of at most ``budget`` tokens. A longer document has a pack to itself.

    The draft computes ``num_positions`` drafted tokens. The engine's blocks may be longer, which are cut, or shorter.
    """
    # The draft reads num_positions tokens after the anchor. Its results beyond the engine's tokens are not used.
    padding = [0] * num_positions
    blocks: list[tuple[list[int], int, list[int]]] = []
    num_tokens = 0
    for item in proposals:
        tokens = item.prompt_ids + item.generation.token_ids
        for anchor, drafted in zip(item.anchors, item.drafted, strict=True):
            document = tokens[: anchor + 1] + drafted + padding
            if blocks and num_tokens + len(document) > budget:
                yield _block_pack(blocks, num_positions, context)
                blocks, num_tokens = [], 0
            blocks.append((document, anchor, drafted[:num_positions]))
            num_tokens += len(document)
    if blocks:
        yield _block_pack(blocks, num_positions, context)


def _block_pack(
    blocks: Sequence[tuple[list[int], int, list[int]]], num_positions: int, context: ContextRanks | None
) -> BlockPack:
    documents, anchors, drafted = zip(*blocks, strict=True)
    token_ids = np.concatenate(documents)
    pack = pack_documents(token_ids, np.ones(len(token_ids), bool), [len(document) for document in documents])
    starts = pack.documents.starts
    pack = pack if context is None else context.divide(pack)
    return BlockPack(
        pack, tuple(start + anchor for start, anchor in zip(starts, anchors, strict=False)), torch.tensor(drafted)
    )


def score_block(
    draft: Draft, states: dict[CapturePoint, Tensor], teacher: Teacher, block: BlockPack, **head: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Log-prob of every drafted token under this draft, and its most probable token there, ``[A, K]``.

    Args:
        head: options of ``losses.logprobs``.
    """
    num_positions, weight_vD = block.drafted_AK.shape[1], teacher.output_weight_vD
    # The draft may compute more tokens than the engine drafted.
    proposed_AKD = draft.propose(states, teacher, block.pack, block.anchors)[:, :num_positions]
    drafted_TD = proposed_AKD.flatten(0, 1)
    logprobs = vocab_parallel_logprobs(drafted_TD, weight_vD, block.drafted_AK.flatten(), temperature=1.0, **head)
    favourites_T = vocab_parallel_argmax(drafted_TD, weight_vD, **head)
    shape = (-1, num_positions)
    return logprobs.logprobs_T.float().view(shape).cpu().numpy(), favourites_T.view(shape).cpu().numpy()


def response_batch(proposals: Sequence[Proposals]) -> TrainBatch:
    """Responses with their prompts, one per row. Advantages, loss weights and rollout log-probs are 0."""
    rows = [item.prompt_ids + item.generation.token_ids for item in proposals]
    lengths_B = np.array([len(row) for row in rows])
    positions_S = np.arange(lengths_B.max())
    is_token_BS = positions_S < lengths_B[:, None]
    token_ids_BS = np.zeros(is_token_BS.shape, np.int64)
    token_ids_BS[is_token_BS] = np.concatenate(rows)
    prompt_lengths_B = np.array([len(item.prompt_ids) for item in proposals])
    loss_mask_BS = is_token_BS & (positions_S >= prompt_lengths_B[:, None])
    zeros_BS = np.zeros(is_token_BS.shape, np.float32)
    return TrainBatch(token_ids_BS, lengths_B, loss_mask_BS, zeros_BS, zeros_BS, zeros_BS)
