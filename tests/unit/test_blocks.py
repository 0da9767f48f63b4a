"""Anchors, supervised slots and visible keys, against loops over positions."""

from __future__ import annotations

import math

import pytest
import torch

from skyrl_spec.drafts.blocks import Blocks, draw_blocks, position_weights, visible, visible_mod

SEGMENTS = torch.tensor([[1] * 6 + [2] * 7 + [0] * 2, [1] * 15])
# The second document has an observation (not trained on) inside its response.
LOSS_MASK = torch.zeros(2, 15, dtype=torch.bool)
LOSS_MASK[0, 2:6] = True
LOSS_MASK[0, 8:13] = True
LOSS_MASK[0, 10] = False
LOSS_MASK[1, 4:] = True
NUM_DRAFTED = 3


def _draw(num_anchors: int, seed: int = 0) -> Blocks:
    return draw_blocks(LOSS_MASK, SEGMENTS, num_anchors, NUM_DRAFTED, torch.Generator().manual_seed(seed))


def _is_supervised(row: int, anchor: int, slot: int) -> bool:
    """Whether all tokens from the anchor to ``anchor + slot`` are trained tokens of one document."""
    if anchor + slot >= SEGMENTS.shape[1]:
        return False
    span = slice(anchor, anchor + slot + 1)
    return bool(LOSS_MASK[row, span].all()) and len(set(SEGMENTS[row, span].tolist())) == 1


def test_all_anchors_are_drawn_where_there_is_room_and_their_slots_supervised_as_a_loop_says() -> None:
    blocks = _draw(15)
    for row in range(2):
        for block in range(15):
            anchor = int(blocks.anchor_BA[row, block])
            expected = [_is_supervised(row, anchor, slot) for slot in range(1, NUM_DRAFTED + 1)]
            assert blocks.supervised_BAK[row, block].tolist() == expected, (row, anchor)
    assert sorted(blocks.anchor_BA[0].tolist()) == list(range(15))


def test_anchors_are_distinct_response_tokens_with_something_to_draft() -> None:
    seen = set()
    for seed in range(20):
        blocks = _draw(4, seed)
        for row in range(2):
            anchors = blocks.anchor_BA[row].tolist()
            assert len(set(anchors)) == 4
            assert all(_is_supervised(row, anchor, 1) for anchor in anchors), (row, anchors)
            seen |= {(row, anchor) for anchor in anchors}
    everything = {(row, a) for row in range(2) for a in range(15) if _is_supervised(row, a, 1)}
    assert seen == everything


def test_rows_without_anchors_have_nothing_supervised() -> None:
    blocks = draw_blocks(torch.zeros_like(LOSS_MASK), SEGMENTS, 4, NUM_DRAFTED, torch.Generator())
    assert not blocks.supervised_BAK.any()


def test_the_draw_depends_on_its_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = _draw(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(_draw(4).anchor_BA, first.anchor_BA)
    assert not torch.equal(_draw(4, seed=3).anchor_BA, first.anchor_BA)


def test_a_slot_sees_its_document_before_its_anchor_and_its_own_block() -> None:
    blocks = _draw(4)
    mask = visible(blocks, SEGMENTS)
    mod = visible_mod(blocks, SEGMENTS)
    num_slots, num_context = 4 * (NUM_DRAFTED + 1), SEGMENTS.shape[1]
    assert mask.shape == (2, 1, num_slots, num_context + num_slots)
    for row in range(2):
        for slot in range(num_slots):
            anchor = int(blocks.anchor_BA[row, slot // (NUM_DRAFTED + 1)])
            for key in range(num_context + num_slots):
                if key < num_context:
                    expected = key < anchor and bool(SEGMENTS[row, key] == SEGMENTS[row, anchor])
                else:
                    expected = (key - num_context) // (NUM_DRAFTED + 1) == slot // (NUM_DRAFTED + 1)
                index = [torch.tensor(i) for i in (row, 0, slot, key)]
                assert bool(mask[row, 0, slot, key]) == expected, (row, slot, key)
                assert bool(mod(*index)) == expected, (row, slot, key)
    assert mask.any(-1).all(), "a slot without a key would give NaN"


@pytest.mark.parametrize("gamma", [4.0, 7.0])
def test_position_weights(gamma: float) -> None:
    expected = [math.exp(-i / gamma) for i in range(7)]
    assert position_weights(7, gamma, torch.device("cpu")).tolist() == pytest.approx(expected)
