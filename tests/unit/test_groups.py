"""Which groups a step takes from those that run at all times."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from skyrl_spec.controller.groups import OpenGroup, choose, rollout_of, rollout_state
from skyrl_spec.types import Generation, Prompt, Rollout, Versions

PROMPT = Prompt("row 0", [1, 2], [], "gsm8k", {"answer": 4})
FINISHED: Any = []


def group(number: int, began: int, *, is_done: bool = True) -> OpenGroup:
    return OpenGroup(number, PROMPT, began, rollouts=FINISHED if is_done else None)


def test_the_first_that_have_finished_are_taken_in_the_order_they_began() -> None:
    groups = [group(1, 0), group(2, 0, is_done=False), group(3, 0), group(4, 0), group(5, 0, is_done=False)]
    assert choose(groups, 0, 2, max_staleness=2) == [groups[0], groups[2]]
    assert choose(groups, 0, 3, max_staleness=2) == [groups[0], groups[2], groups[3]]
    assert choose(groups, 0, 4, max_staleness=2) is None


def test_a_step_waits_for_a_group_that_later_ones_could_not_take_in_time() -> None:
    late = group(1, 0, is_done=False)
    others = [group(2, 1), group(3, 1)]
    assert choose([late, *others], 1, 2, max_staleness=2) == others
    # At version 2 it is two steps old, which is the most.
    assert choose([late, group(4, 2), group(5, 2)], 2, 2, max_staleness=2) is None
    late.rollouts = FINISHED
    chosen = choose([late, group(4, 2), group(5, 2)], 2, 2, max_staleness=2)
    assert chosen is not None
    assert chosen[0] is late


def test_three_old_ones_do_not_fit_into_the_one_step_that_is_left() -> None:
    old = [group(number, 0, is_done=False) for number in range(3)]
    young = [group(number, 1) for number in range(3, 5)]
    # Steps of two groups: at version 1 one of them must be taken, for the other two to be taken at version 2.
    assert choose([*old, *young], 1, 2, max_staleness=2) is None
    old[1].rollouts = FINISHED
    assert choose([*old, *young], 1, 2, max_staleness=2) == [old[1], young[0]]


def test_where_fewer_suffice_an_old_group_is_still_waited_for() -> None:
    """Dynamic sampling gives up on a full batch, but not on the bound."""
    late, young = group(1, 0, is_done=False), group(2, 2)
    assert choose([late, young], 1, 2, max_staleness=2, least=0) == [young]
    assert choose([late, young], 2, 2, max_staleness=2, least=0) is None
    late.rollouts = FINISHED
    assert choose([late, young], 2, 2, max_staleness=2, least=0) == [late, young]
    assert choose([], 2, 2, max_staleness=2, least=0) == []


def test_the_last_groups_of_a_run_may_be_fewer() -> None:
    last = group(1, 3)
    assert choose([last], 3, 4, max_staleness=2) == [last]
    assert choose([], 3, 4, max_staleness=2) == []


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 4), st.floats(0, 0.9))
def test_no_group_is_older_than_allowed_and_a_step_always_comes(
    seed: int, size: int, max_staleness: int, dropped: float
) -> None:
    """Groups end in any order, and dynamic sampling drops some. As many run as ``Continuous`` lets begin."""
    chance = random.Random(seed)
    groups: list[OpenGroup] = []
    num_begun = 0

    def go_on(version: int, in_training: int) -> None:
        nonlocal num_begun
        running = [one for one in groups if one.rollouts is None]
        if running:
            ending = chance.choice(running)
            if chance.random() < dropped:
                groups.remove(ending)
            else:
                ending.rollouts = FINISHED
        while len(groups) + in_training < (max_staleness + 1) * size:
            num_begun += 1
            groups.append(group(num_begun, version, is_done=False))

    for version in range(12):
        for _ in range(1000):
            go_on(version, in_training=0)
            if (chosen := choose(groups, version, size, max_staleness)) is not None:
                break
        else:
            raise AssertionError("no batch comes")
        assert len(chosen) == size
        assert all(version - one.began <= max_staleness for one in chosen)
        groups = [one for one in groups if one not in chosen]
        # The engines have the weights of before, until the step has ended.
        for _ in range(chance.randrange(3 * size)):
            go_on(version, in_training=size)


def test_a_finished_group_survives_a_checkpoint() -> None:
    generation = Generation([3, 4, 5], [-1.0, -0.5, -2.0], "stop", Versions(3, 2), ((1, Versions(4, 2)),), (1, 2))
    rollout = Rollout(PROMPT, generation, "text", 0.5, [1, 0, 1], None, ("a", "b", "c"))
    assert rollout_of(PROMPT, rollout_state(rollout)) == rollout
