"""From rollouts to packs: every token arrives exactly once, with its mask, advantage and log-prob."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_spec.data.packing import build_train_batch, gather_shards, mini_batches, pack_rows, shard_rows
from skyrl_spec.training.step import Micro, build_micro
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


def make_batch(rollouts: list[Rollout], advantages: list[float], reduction: str = "token_mean") -> TrainBatch:
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
    batch = make_batch([rollout([1, 2], [3, 4, 5], [1, 0, 1]), rollout([6], [7])], [0.5, -2.0])
    np.testing.assert_array_equal(batch.token_ids, [[1, 2, 3, 4, 5], [6, 7, PAD, PAD, PAD]])
    np.testing.assert_array_equal(batch.lengths, [5, 2])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.advantages, [[0, 0, 0.5, 0.5, 0.5], [0, -2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.rollout_logprobs, [[0, 0, -0.25, -0.5, -0.75], [0, -0.25, 0, 0, 0]])
    np.testing.assert_allclose(batch.loss_weights, batch.loss_mask / 3, rtol=1e-6)
    dtypes = {name: value.dtype.name for name, value in batch.__dict__.items() if value is not None}
    assert dtypes == {
        "token_ids": "int64",
        "lengths": "int64",
        "loss_mask": "bool",
        "loss_weights": "float32",
        "advantages": "float32",
        "rollout_logprobs": "float32",
    }


def test_an_empty_response_is_a_row_without_loss() -> None:
    batch = make_batch([rollout([1, 2], []), rollout([3], [4, 5])], [1.0, 2.0])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 0], [0, 1, 1]])


@given(rollouts=rollout_lists())
def test_packing_loses_nothing(rollouts: list[Rollout]) -> None:
    batch = make_batch(rollouts, [float(index) for index in range(len(rollouts))])
    assert len(batch) == len(rollouts)
    for index, source in enumerate(rollouts):
        length = int(batch.lengths[index])
        response = slice(len(source.prompt.token_ids), length)
        assert batch.token_ids[index, :length].tolist() == source.prompt.token_ids + source.generation.token_ids
        assert batch.loss_mask[index, response].tolist() == [bool(m) for m in source.loss_mask]
        assert batch.rollout_logprobs[index, response].tolist() == source.generation.logprobs
        assert (batch.token_ids[index, length:] == PAD).all()
        assert not batch.loss_mask[index, : response.start].any()
        assert not batch.loss_mask[index, length:].any()


def micros_of(batch: TrainBatch, rank: int, dp_size: int, budget: int) -> list[Micro]:
    rows = shard_rows(batch.lengths, dp_size)[rank]
    return [build_micro(batch, rows[pack]) for pack in pack_rows(batch.lengths[rows], budget)]


@given(rollouts=rollout_lists(), rows=st.integers(1, 4), dp_size=st.integers(1, 4), budget=st.integers(1, 60))
def test_every_document_reaches_one_pack(rollouts: list[Rollout], rows: int, dp_size: int, budget: int) -> None:
    """The loss is a sum over micro-batches and ranks, so that the weights of a mini-batch must add up to 1."""
    batch = make_batch(rollouts, [0.0] * len(rollouts))
    seen = []
    for mini in mini_batches(batch, rows, loss_reduction="token_mean", max_response_length=16):
        total = 0.0
        for rank in range(dp_size):
            for micro in micros_of(mini, rank, dp_size, budget):
                lengths = micro.pack.documents.lengths
                assert sum(lengths) <= budget or len(lengths) == 1
                assert len(lengths) == len(micro.rows)
                total += float(micro.loss_weights_N.sum())
                ids = micro.pack.token_ids_T.tolist()
                seen += [tuple(ids[tokens]) for tokens in micro.pack.documents.slices()]
        assert total == pytest.approx(1.0 if mini.loss_mask.any() else 0.0, abs=1e-5)
    assert sorted(seen) == sorted(tuple(r.prompt.token_ids + r.generation.token_ids) for r in rollouts)


@given(rollouts=rollout_lists(), budget=st.integers(1, 60))
def test_a_pack_has_each_response_token_with_its_values(rollouts: list[Rollout], budget: int) -> None:
    batch = make_batch(rollouts, [float(index) for index in range(len(rollouts))])
    for micro in micros_of(batch, 0, 1, budget):
        sources = [rollouts[row] for row in micro.rows]
        ids = [token for r in sources for token in r.prompt.token_ids + r.generation.token_ids]
        positions = [index for r in sources for index in range(len(r.prompt.token_ids + r.generation.token_ids))]
        trained = [
            (token, logprob, float(row))
            for row, r in zip(micro.rows, sources, strict=True)
            for token, logprob, mask in zip(r.generation.token_ids, r.generation.logprobs, r.loss_mask, strict=True)
            if mask
        ]
        assert micro.pack.token_ids_T.tolist() == ids
        assert micro.pack.position_T.tolist() == positions
        assert micro.pack.segment_ids_T.tolist() == [
            number for number, r in enumerate(sources, start=1) for _ in r.prompt.token_ids + r.generation.token_ids
        ]
        values = zip(micro.target_n, micro.rollout_logprobs_N, micro.advantages_N, strict=True)
        assert [tuple(map(float, value)) for value in values] == trained
        # The distribution over a token is that of the position before it.
        assert torch.equal(micro.pack.token_ids_T[micro.position_n + 1], micro.target_n)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mini_batches_have_their_own_denominator(reduction: str) -> None:
    rollouts = [rollout([1], [2] * size) for size in (1, 3, 5, 7, 2)]
    parts = list(
        mini_batches(make_batch(rollouts, [0.0] * 5, reduction), 2, loss_reduction=reduction, max_response_length=16)
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


def test_shards_have_like_amounts_of_work() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(400), 1.2, 256).astype(int).clip(2, 30_000)
    shards = shard_rows(lengths, 4)
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(256))
    # Attention costs as much as all else at 49,152 tokens.
    work = [float((lengths[rows] + lengths[rows] ** 2 / 49_152).sum()) for rows in shards]
    assert max(work) / min(work) < 1.01
    assert all(len(rows) for rows in shards)


def test_packs_are_full() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.0, 500).astype(int).clip(2, 8192)
    packs = pack_rows(lengths, 8192)
    np.testing.assert_array_equal(np.sort(np.concatenate(packs)), np.arange(500))
    assert all(lengths[pack].sum() <= 8192 for pack in packs)
    assert len(packs) == -(-lengths.sum() // 8192)


def test_packs_by_hand() -> None:
    # 9 is above the budget and alone. 5 and 3, 4 and 2 and 1 fill a pack each.
    packs = pack_rows(np.array([1, 5, 9, 4, 3, 2]), 8)
    assert [pack.tolist() for pack in packs] == [[2], [1, 4], [0, 3, 5]]
    assert pack_rows(np.array([], np.int64), 8) == []


def test_a_rank_without_rows_computes_a_token_without_loss() -> None:
    batch = make_batch([rollout([1], [2, 3])], [1.0])
    rows = shard_rows(batch.lengths, 2)[1]
    assert not len(rows)
    micro = build_micro(batch, rows)
    assert len(micro.pack.token_ids_T) == 1
    assert not micro.pack.loss_mask_T.any()
    assert len(micro.target_n) == 0


@given(rollouts=rollout_lists(), dp_size=st.integers(1, 4))
def test_results_of_shards_come_back_in_order(rollouts: list[Rollout], dp_size: int) -> None:
    batch = make_batch(rollouts, [0.0] * len(rollouts))
    shards = [{"logprobs": batch.rollout_logprobs[rows]} for rows in shard_rows(batch.lengths, dp_size)]
    np.testing.assert_array_equal(gather_shards(batch, shards)["logprobs"], batch.rollout_logprobs)
