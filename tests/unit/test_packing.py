"""From rollouts to micro-batches: every token arrives exactly once, with its mask, advantage and log-prob."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_spec.data.packing import (
    assemble,
    build_train_batch,
    micro_batch_rows,
    micro_batches,
    mini_batches,
    shard,
    shard_rows,
)
from skyrl_spec.types import Generation, Prompt, Rollout, TrainBatch, Versions

PAD = 99
REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")


def rollout(prompt_ids: list[int], response_ids: list[int], loss_mask: list[int] | None = None) -> Rollout:
    logprobs = [-0.25 * (index + 1) for index in range(len(response_ids))]
    return Rollout(
        prompt=Prompt("0", prompt_ids, [], "gsm8k", {}),
        generation=Generation(response_ids, logprobs, "stop", Versions()),
        text="",
        reward=0.0,
        loss_mask=[1] * len(response_ids) if loss_mask is None else loss_mask,
    )


def pack(rollouts: list[Rollout], advantages: list[float], reduction: str = "token_mean") -> TrainBatch:
    return build_train_batch(rollouts, advantages, pad_token_id=PAD, loss_reduction=reduction, max_response_length=16)


def ids() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 50), min_size=1, max_size=12)


@st.composite
def rollout_lists(draw: st.DrawFn) -> list[Rollout]:
    out = []
    for _ in range(draw(st.integers(1, 9))):
        prompt_ids, response_ids = draw(ids()), draw(ids())
        size = len(response_ids)
        out.append(rollout(prompt_ids, response_ids, draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))))
    return out


def test_a_batch_by_hand() -> None:
    batch = pack([rollout([1, 2], [3, 4, 5], [1, 0, 1]), rollout([6], [7])], [0.5, -2.0])
    np.testing.assert_array_equal(batch.token_ids, [[1, 2, 3, 4, 5], [6, 7, PAD, PAD, PAD]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.advantages, [[0, 0, 0.5, 0.5, 0.5], [0, -2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.rollout_logprobs, [[0, 0, -0.25, -0.5, -0.75], [0, -0.25, 0, 0, 0]])
    np.testing.assert_allclose(batch.loss_weights, batch.loss_mask / 3, rtol=1e-6)
    dtypes = {name: value.dtype.name for name, value in batch.__dict__.items() if value is not None}
    assert dtypes == {
        "token_ids": "int64",
        "segment_ids": "int64",
        "loss_mask": "bool",
        "loss_weights": "float32",
        "advantages": "float32",
        "rollout_logprobs": "float32",
    }


def test_an_empty_response_is_a_row_without_loss() -> None:
    batch = pack([rollout([1, 2], []), rollout([3], [4, 5])], [1.0, 2.0])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 0], [0, 1, 1]])


@given(rollouts=rollout_lists())
def test_packing_loses_nothing(rollouts: list[Rollout]) -> None:
    batch = pack(rollouts, [float(index) for index in range(len(rollouts))])
    assert len(batch) == len(rollouts)
    for index, source in enumerate(rollouts):
        length = int((batch.segment_ids[index] > 0).sum())
        response = slice(len(source.prompt.token_ids), length)
        assert batch.token_ids[index, :length].tolist() == source.prompt.token_ids + source.generation.token_ids
        assert batch.loss_mask[index, response].tolist() == [bool(m) for m in source.loss_mask]
        assert batch.rollout_logprobs[index, response].tolist() == source.generation.logprobs
        assert (batch.token_ids[index, length:] == PAD).all()
        assert not batch.loss_mask[index, : response.start].any()
        assert not batch.loss_mask[index, length:].any()


@given(rollouts=rollout_lists(), rows=st.integers(1, 4), dp_size=st.integers(1, 4), micro_rows=st.integers(1, 3))
def test_every_row_reaches_one_micro_batch(rollouts: list[Rollout], rows: int, dp_size: int, micro_rows: int) -> None:
    """The loss is a sum over micro-batches and ranks, so that the weights of a mini-batch must add up to 1."""
    batch = pack(rollouts, [0.0] * len(rollouts))
    seen = []
    for mini in mini_batches(batch, rows, loss_reduction="token_mean", max_response_length=16):
        total = 0.0
        for rank in range(dp_size):
            for micro in micro_batches(shard(mini, rank, dp_size), micro_rows):
                assert 1 <= len(micro) <= micro_rows
                total += float(micro.loss_weights.sum())
                seen += [tuple(ids[mask > 0]) for ids, mask in zip(micro.token_ids, micro.segment_ids, strict=True)]
        assert total == pytest.approx(1.0 if mini.loss_mask.any() else 0.0, abs=1e-5)
    expected = [tuple(r.prompt.token_ids + r.generation.token_ids) for r in rollouts]
    assert sorted(row for row in seen if row) == sorted(expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mini_batches_have_their_own_denominator(reduction: str) -> None:
    rollouts = [rollout([1], [2] * size) for size in (1, 3, 5, 7, 2)]
    parts = list(
        mini_batches(pack(rollouts, [0.0] * 5, reduction), 2, loss_reduction=reduction, max_response_length=16)
    )
    assert [len(part) for part in parts] == [2, 2, 1]
    expected = {
        "token_mean": [1 / 4, 1 / 12, 1 / 2],
        "sequence_mean": [1 / 2, 1 / 10, 1 / 2],
        "seq_mean_token_sum_norm": [1 / 32, 1 / 32, 1 / 16],
    }[reduction]
    # Weight of the first response token in the first row of each mini-batch, in float32.
    np.testing.assert_allclose([part.loss_weights[0, 1] for part in parts], expected, rtol=1e-6)
    assert parts[0].token_ids.shape == (2, 4)


def test_shards_have_like_numbers_of_tokens() -> None:
    rng = np.random.default_rng(0)
    rollouts = [rollout([1] * 5, [2] * int(size)) for size in rng.integers(1, 200, 64)]
    batch = pack(rollouts, [0.0] * 64)
    tokens = [int((shard(batch, rank, 4).segment_ids > 0).sum()) for rank in range(4)]
    # Rows are dealt by length, so that two ranks differ by less than the longest row.
    assert max(tokens) - min(tokens) < 205
    assert max(tokens) / min(tokens) < 1.1
    np.testing.assert_array_equal(np.sort(np.concatenate(shard_rows(batch, 4))), np.arange(64))


def test_a_rank_without_rows_gets_padding() -> None:
    batch = pack([rollout([1], [2, 3])], [1.0])
    empty = shard(batch, 1, 2)
    assert len(empty) == 1
    for name in ("segment_ids", "loss_mask", "loss_weights", "advantages"):
        assert not getattr(empty, name).any()
    assert len(micro_batches(empty, 4)) == 1


def test_micro_batches_are_cut_to_their_longest_row() -> None:
    batch = pack([rollout([1], [2] * size) for size in (1, 9, 2, 8, 3)], [0.0] * 5)
    assert [micro.token_ids.shape for micro in micro_batches(batch, 2)] == [(2, 10), (2, 4), (1, 2)]


@given(rollouts=rollout_lists(), dp_size=st.integers(1, 4), rows=st.integers(1, 3))
def test_assemble_undoes_shards_and_micro_batches(rollouts: list[Rollout], dp_size: int, rows: int) -> None:
    batch = pack(rollouts, [0.0] * len(rollouts))
    parts = []
    for rank in range(dp_size):
        mine = shard(batch, rank, dp_size)
        micros = [micro.rollout_logprobs for micro in micro_batches(mine, rows)]
        parts.append(assemble(micros, micro_batch_rows(mine, rows), mine.token_ids.shape))
    found = assemble(parts, shard_rows(batch, dp_size), batch.token_ids.shape)
    np.testing.assert_array_equal(found, batch.rollout_logprobs)
