"""Anchors, supervised slots and visible keys, against loops over positions; the kernels against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from skyrl_spec.drafts import block_attention
from skyrl_spec.drafts.block_attention import BlockAttention, Keys, cpu_block_attention, flex_block_attention
from skyrl_spec.drafts.blocks import Blocks, draw_anchors, position_weights, supervised_blocks, visible
from skyrl_spec.models.pack import Pack, pack_documents

LENGTHS = (6, 7, 1, 15)
STARTS = (0, 6, 13, 14)
# The second document has an observation (not trained on) inside its response.
LOSS_MASK = np.zeros(29, bool)
LOSS_MASK[2:6] = LOSS_MASK[8:13] = LOSS_MASK[18:] = True
LOSS_MASK[10] = False
NUM_DRAFTED = 3
PACK = pack_documents(np.zeros(29, np.int64), LOSS_MASK, LENGTHS)


def _draw(num_anchors: int, seed: int = 0) -> list[int]:
    return draw_anchors(PACK, [(seed, row) for row in range(len(LENGTHS))], [num_anchors] * len(LENGTHS))


def _document(position: int) -> int:
    return int(PACK.segment_ids_T[position])


def _is_supervised(anchor: int, slot: int) -> bool:
    """Whether all tokens from the anchor to ``anchor + slot`` are trained tokens of one document."""
    span = range(anchor, anchor + slot + 1)
    if span[-1] >= len(LOSS_MASK):
        return False
    return all(LOSS_MASK[position] for position in span) and len({_document(position) for position in span}) == 1


def test_all_anchors_are_drawn_where_there_is_room_and_their_slots_supervised_as_a_loop_says() -> None:
    anchors = _draw(1000)
    assert anchors == [position for position in range(29) if _is_supervised(position, 1)]
    blocks = supervised_blocks(anchors, PACK, NUM_DRAFTED)
    for block, anchor in enumerate(anchors):
        expected = [_is_supervised(anchor, slot) for slot in range(1, NUM_DRAFTED + 1)]
        assert blocks.supervised_AK[block].tolist() == expected, anchor
        assert blocks.starts[block] == max(start for start in STARTS if start <= anchor)
    assert blocks.anchor_A.tolist() == list(blocks.anchors) == anchors
    assert blocks.start_A.tolist() == list(blocks.starts)


def test_each_document_has_its_own_draw_of_distinct_anchors() -> None:
    seen = set()
    for seed in range(40):
        anchors = _draw(3, seed)
        assert anchors == sorted(set(anchors))
        assert [sum(_document(anchor) == document for anchor in anchors) for document in (1, 2, 3, 4)] == [3, 2, 0, 3]
        seen |= set(anchors)
    assert seen == {position for position in range(29) if _is_supervised(position, 1)}


def test_a_documents_anchors_depend_on_its_seed_alone() -> None:
    order = (3, 1, 0, 2)
    tokens = [slice(start, start + length) for start, length in zip(STARTS, LENGTHS, strict=True)]
    lengths = [LENGTHS[row] for row in order]
    shuffled = pack_documents(
        np.zeros(29, np.int64), np.concatenate([LOSS_MASK[tokens[row]] for row in order]), lengths
    )
    anchors = draw_anchors(shuffled, [(0, row) for row in order], [2] * len(order))
    mine = [(order[int(shuffled.segment_ids_T[a]) - 1], int(shuffled.position_T[a])) for a in anchors]
    assert sorted(mine) == [(_document(a) - 1, int(PACK.position_T[a])) for a in _draw(2)]


def test_unsupervised_blocks_have_nothing_supervised() -> None:
    assert draw_anchors(pack_documents(np.zeros(29, np.int64), np.zeros(29, bool), LENGTHS), [(0,)] * 4, [4] * 4) == []
    assert not supervised_blocks([0], PACK, NUM_DRAFTED).supervised_AK.any()


def test_a_slot_sees_its_document_before_the_anchor_and_its_block() -> None:
    blocks = supervised_blocks(_draw(4), PACK, NUM_DRAFTED)
    seen_QN, slots = visible(blocks, 29), blocks.num_slots
    assert slots == NUM_DRAFTED + 1
    for query in range(len(seen_QN)):
        anchor = blocks.anchors[query // slots]
        for key in range(seen_QN.shape[1]):
            in_pack = key < 29 and key < anchor and _document(key) == _document(anchor)
            in_block = key >= 29 and (key - 29) // slots == query // slots
            assert bool(seen_QN[query, key]) == (in_pack or in_block), (query, key)


def test_a_block_at_the_first_token_of_a_document_belongs_to_it() -> None:
    blocks = supervised_blocks([0, 6, 14], PACK, NUM_DRAFTED)
    assert blocks.starts == (0, 6, 14)
    assert blocks.position_Q()[:: NUM_DRAFTED + 1].tolist() == [0, 0, 0]


def test_positions_continue_from_the_anchors() -> None:
    blocks = supervised_blocks([4, 9, 28], PACK, NUM_DRAFTED)
    assert blocks.position_Q().tolist() == [4, 5, 6, 7, 3, 4, 5, 6, 14, 15, 16, 17]


@pytest.mark.parametrize("gamma", [0.5, 4.0])
def test_weights_decay_from_one(gamma: float) -> None:
    weights = position_weights(5, gamma).tolist()
    assert weights == pytest.approx([math.exp(-index / gamma) for index in range(5)])


# ---- attention ------------------------------------------------------------------------------------------------------


def _pack(*lengths: int) -> Pack:
    total = sum(lengths)
    return pack_documents(np.zeros(total, np.int64), np.random.default_rng(0).random(total) < 0.9, lengths)


def _blocks(pack: Pack, num_anchors: int) -> Blocks:
    num_documents = len(pack.documents.lengths)
    anchors = draw_anchors(pack, [(0, row) for row in range(num_documents)], [num_anchors] * num_documents)
    return supervised_blocks(anchors, pack, NUM_DRAFTED)


def _inputs(num_tokens: int, num_slots: int) -> tuple[Tensor, Keys]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_slots, 4, 32, generator=generator)
    sizes = (num_tokens, num_tokens, num_slots, num_slots)
    return query, Keys(*(torch.randn(size, 2, 32, generator=generator) for size in sizes))


def _definition(blocks: Blocks, num_tokens: int) -> BlockAttention:
    seen_QN = visible(blocks, num_tokens)

    def attend(query_QHd: Tensor, keys: Keys, scale: float) -> Tensor:
        key = torch.cat([keys.token_key_TGd, keys.slot_key_QGd]).repeat_interleave(2, dim=1)
        value = torch.cat([keys.token_value_TGd, keys.slot_value_QGd]).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,nhd->hqn", query_QHd, key) * scale
        return torch.einsum("hqn,nhd->qhd", scores.masked_fill(~seen_QN, -torch.inf).softmax(-1), value)

    return attend


@pytest.mark.parametrize("lengths", [(7, 9, 1, 30), (300, 5, 260), (900,), (2,)], ids=str)
@pytest.mark.parametrize("build", [cpu_block_attention, flex_block_attention])
def test_the_kernels_give_the_definition(
    build: Callable[[Blocks, int], BlockAttention], lengths: tuple[int, ...], monkeypatch
) -> None:
    """FlexAttention has no backward pass on a CPU. The checks of tests/gpu compare its gradients."""
    # The long documents have spans with tokens that all blocks see; the blocks of the short ones are all near.
    monkeypatch.setattr(block_attention, "BLOCKS_AT_A_TIME", 16)
    monkeypatch.setattr(block_attention, "MAX_NEAR", 100)
    pack, num_tokens = _pack(*lengths), sum(lengths)
    blocks = _blocks(pack, 40) if num_tokens > 2 else supervised_blocks([0], pack, NUM_DRAFTED)
    query, keys = _inputs(num_tokens, len(blocks.anchors) * blocks.num_slots)
    leaves = [query, *keys]
    for leaf in leaves:
        leaf.requires_grad_(build is cpu_block_attention)
    outputs = [make(blocks, num_tokens)(query, keys, 0.2) for make in (build, _definition)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    if build is cpu_block_attention:
        upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
        # A single block at a document's start sees no token.
        mine, theirs = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in outputs)
        for got, wanted in zip(mine, theirs, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_anchors", [3, 40, 1000])
@pytest.mark.parametrize("lengths", [(7, 9, 1, 30), (300, 5, 260), (1000,), (129, 127, 128)], ids=str)
def test_tiles_are_those_that_the_definition_fills_in_part_and_whole(
    lengths: tuple[int, ...], num_anchors: int
) -> None:
    """Eager FlexAttention ignores the tiles, so that its output cannot show a wrong one."""
    pack, tile = _pack(*lengths), block_attention.TILE
    blocks = _blocks(pack, num_anchors)
    seen_QN = visible(blocks, sum(lengths)).numpy()
    in_part, whole = (_listed(table, seen_QN.shape[1]) for table in block_attention._tiles(blocks, sum(lengths)))
    for row, column in np.ndindex(in_part.shape):
        part = seen_QN[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        assert not (in_part[row, column] and whole[row, column])
        assert in_part[row, column] or whole[row, column] or not part.any(), (row, column)
        assert not whole[row, column] or part.all(), (row, column)
    if len(lengths) == 1 and num_anchors == 1000:
        assert whole.any(), "no tile is taken without the mask"
    if len(in_part) > 4:
        assert (in_part | whole).mean() < 0.8, "nearly every tile is computed"


def _listed(table: tuple[np.ndarray, np.ndarray], num_keys: int) -> np.ndarray:
    numbers, columns = table
    assert columns.shape == (len(numbers), -(-num_keys // block_attention.TILE))
    listed = np.zeros(columns.shape, bool)
    for row, number in enumerate(numbers):
        listed[row, columns[row, :number]] = True
    return listed
