"""Order of the prompts: each once per epoch, fixed by the seed, and the same after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.errors import ConfigError
from skyrl_spec.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(index), [index], [], "gsm8k", {}) for index in range(count)]


def uids(stream: PromptStream, num_batches: int) -> list[list[str]]:
    return [[prompt.uid for prompt in stream.next_batch()] for _ in range(num_batches)]


def test_an_epoch_gives_each_prompt_once_and_drops_the_tail() -> None:
    stream = PromptStream(prompts(10), 3, seed=1, shuffle=True)
    assert stream.steps_per_epoch == 3
    epochs = [list(chain.from_iterable(uids(stream, 3))) for _ in range(20)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    # The dropped prompt changes, so that every prompt is used.
    assert set().union(*epochs) == {str(index) for index in range(10)}
    assert stream.epoch == 20


def test_epoch_counts_those_completed() -> None:
    stream = PromptStream(prompts(7), 3, seed=0, shuffle=True)
    seen = [stream.epoch]
    for _ in range(4):
        stream.next_batch()
        seen.append(stream.epoch)
    assert seen == [0, 0, 1, 1, 2]


def test_without_shuffle_the_order_is_the_files() -> None:
    assert uids(PromptStream(prompts(5), 2, seed=0, shuffle=False), 3) == [["0", "1"], ["2", "3"], ["0", "1"]]


def test_seeds_give_different_orders() -> None:
    first, same, other = (uids(PromptStream(prompts(50), 50, seed=seed, shuffle=True), 1) for seed in (0, 0, 1))
    assert first == same
    assert first != other


@given(
    count=st.integers(1, 40),
    data=st.data(),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
    num_before=st.integers(0, 30),
)
def test_a_resumed_stream_goes_on_exactly(
    count: int, data: st.DataObject, seed: int, shuffle: bool, num_before: int
) -> None:
    batch_size = data.draw(st.integers(1, count))
    stream = PromptStream(prompts(count), batch_size, seed=seed, shuffle=shuffle)
    uids(stream, num_before)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(prompts(count), batch_size, seed=seed, shuffle=shuffle)
    resumed.load_state_dict(state)
    assert resumed.epoch == stream.epoch
    assert uids(resumed, 8) == uids(stream, 8)


def test_resume_with_another_batch_size_repeats_no_prompt_of_the_epoch() -> None:
    stream = PromptStream(prompts(12), 4, seed=3, shuffle=True)
    (before,) = uids(stream, 1)
    resumed = PromptStream(prompts(12), 8, seed=3, shuffle=True)
    resumed.load_state_dict(stream.state_dict())
    (after,) = uids(resumed, 1)
    assert len({*before, *after}) == 12


def test_errors_name_the_setting() -> None:
    for batch_size in (0, 6):
        with pytest.raises(
            ConfigError,
            match=rf"^trainer\.train_batch_size={batch_size}: must be from 1 to 5, the number of prompts in data",
        ):
            PromptStream(prompts(5), batch_size, seed=0, shuffle=True)
    state = PromptStream(prompts(5), 2, seed=0, shuffle=True).state_dict()
    changed = {
        "data.train_data": PromptStream(prompts(6), 2, seed=0, shuffle=True),
        "trainer.seed": PromptStream(prompts(5), 2, seed=1, shuffle=True),
        "data.shuffle": PromptStream(prompts(5), 2, seed=0, shuffle=False),
    }
    for setting, stream in changed.items():
        with pytest.raises(ConfigError, match=f"^{setting}[:=]"):
            stream.load_state_dict(state)


def changed_prompts(change: str) -> list[Prompt]:
    """As many prompts as ``prompts(4)``, one of them another."""
    first, *rest = prompts(4)
    first = {
        "token": replace(first, token_ids=[7]),
        "answer": replace(first, extras={"reward_spec": {"ground_truth": "7"}}),
        "environment": replace(first, env_class="multiply"),
    }.get(change, first)
    return [*rest, first] if change == "order" else [first, *rest]


@pytest.mark.parametrize("change", ["token", "answer", "environment", "order"])
def test_other_data_with_as_many_rows_is_refused(change: str) -> None:
    state = PromptStream(prompts(4), 2, seed=0, shuffle=True, source="a.jsonl").state_dict()
    other = PromptStream(changed_prompts(change), 2, seed=0, shuffle=True, source="b.jsonl")
    with pytest.raises(ConfigError, match=r"^data\.train_data=b\.jsonl: its 4 prompts are not .* \(4 of a\.jsonl\)"):
        other.load_state_dict(state)


def test_the_same_data_under_another_name_is_accepted() -> None:
    state = PromptStream(prompts(4), 2, seed=0, shuffle=True, source="a.jsonl").state_dict()
    moved = PromptStream(prompts(4), 2, seed=0, shuffle=True, source="b.jsonl")
    moved.load_state_dict(state)
    assert uids(moved, 2) == uids(PromptStream(prompts(4), 2, seed=0, shuffle=True), 2)


def test_a_state_of_an_earlier_version_tells_the_number_of_prompts_only() -> None:
    state = {"epoch": 1, "position": 2, "num_prompts": 4, "seed": 0, "shuffle": True}
    PromptStream(prompts(4), 2, seed=0, shuffle=True).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"5 prompts are not those of the checkpoint \(4 of other files\)"):
        PromptStream(prompts(5), 2, seed=0, shuffle=True).load_state_dict(state)


@given(count=st.integers(1, 12), data=st.data(), num_before=st.integers(0, 20), epochs=st.integers(1, 4))
def test_the_number_of_batches_is_what_can_be_taken(
    count: int, data: st.DataObject, num_before: int, epochs: int
) -> None:
    """Also after a resumption with another batch size."""
    before, after = (data.draw(st.integers(1, count)) for _ in range(2))
    stream = PromptStream(prompts(count), before, seed=0, shuffle=True)
    uids(stream, num_before)
    resumed = PromptStream(prompts(count), after, seed=0, shuffle=True)
    resumed.load_state_dict(stream.state_dict())
    expected = resumed.num_batches(epochs)
    while resumed.epoch < epochs:
        resumed.next_batch()
    assert resumed.num_taken == expected
