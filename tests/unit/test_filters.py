"""Dynamic sampling: the groups it keeps, when it ends, and its counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from skyrl_spec.algorithms.filters import Group, collect_groups, keep_informative
from skyrl_spec.settings.algorithm import DynamicSamplingConfig
from skyrl_spec.types import Generation, Prompt, Rollout, Versions

FILTER = DynamicSamplingConfig(type="filter", max_sample_batches=3)


def group(*rewards: float) -> Group:
    prompt = Prompt("0", [1], [], "gsm8k", {})
    return [Rollout(prompt, Generation([2], [-1.0], "stop", Versions()), "", reward, [1]) for reward in rewards]


RIGHT, WRONG, MIXED = group(1, 1), group(0, 0), group(0, 1)


def sampler(*batches: Sequence[Group]) -> Callable[[], Sequence[Group]]:
    """A function that returns the batches one by one, and raises StopIteration after the last."""
    source = iter(batches)
    return lambda: next(source)


def test_groups_with_equal_rewards_are_dropped() -> None:
    assert keep_informative([RIGHT, MIXED, WRONG, group(1, 1, 0.5)]) == [MIXED, group(1, 1, 0.5)]
    assert keep_informative([group(0)]) == [group(0)]


def test_samples_until_there_are_enough() -> None:
    found = collect_groups(sampler([MIXED, RIGHT], [WRONG, MIXED], [MIXED, MIXED]), 2, FILTER)
    assert (found.num_batches, found.num_kept) == (2, 2)
    assert found.groups == [MIXED, MIXED]
    assert found.sampled == [MIXED, RIGHT, WRONG, MIXED]


def test_what_is_more_than_enough_is_cut() -> None:
    found = collect_groups(sampler([MIXED, RIGHT], [MIXED, MIXED]), 2, FILTER)
    assert (len(found.groups), found.num_kept, found.num_batches) == (2, 3, 2)


def test_goes_on_with_what_it_has_after_max_sample_batches() -> None:
    found = collect_groups(sampler([MIXED, RIGHT], [WRONG, RIGHT], [RIGHT, RIGHT]), 2, FILTER)
    assert (found.groups, found.num_batches, found.num_kept) == ([MIXED], 3, 1)
    none = collect_groups(sampler(*[[RIGHT, WRONG]] * 3), 2, FILTER)
    assert (none.groups, none.num_kept, len(none.sampled)) == ([], 0, 6)


def test_without_a_filter_one_batch_is_taken_as_it_is() -> None:
    found = collect_groups(sampler([RIGHT, WRONG]), 2, DynamicSamplingConfig())
    assert found.groups == found.sampled == [RIGHT, WRONG]
    assert (found.num_batches, found.num_kept) == (1, 2)
