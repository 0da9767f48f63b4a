"""Decisions of trainer.draft.train against simulated drafts whose gain and cost are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from skyrl_spec.controller.draft_training import (
    HORIZON,
    LONGEST_REST,
    WINDOW,
    AutoDraftTraining,
    DraftTraining,
    build_draft_training,
)
from skyrl_spec.metrics import names
from skyrl_spec.types import CANDIDATE, EARLIER, SERVED

GENERATE_S, COST_S, LENGTH = 10.0, 1.0, 3.0


class Simulation:
    """Rollouts of ``GENERATE_S`` with a draft that loses ``slope(step)`` of its acceptance length in each idle step."""

    def __init__(self, slope: Callable[[int], float], noise: float = 0.0, seed: int = 0):
        self._slope, self._noise, self._rng = slope, noise, np.random.default_rng(seed)
        self._served = self._earlier = LENGTH
        self.trained: list[bool] = []
        self.metrics: list[dict[str, float]] = []

    def run(self, training: DraftTraining, num_steps: int) -> None:
        for _ in range(num_steps):
            step = len(self.trained)
            plan = training.plan(step)
            if EARLIER in plan.kept:
                self._earlier = self._served
            # Rollouts draft two tokens in one step and three in the next.
            drafted = 2 + step % 2
            rate = _rate(self._served)
            values = {names.acceptance_length("train"): sum(rate**index for index in range(drafted + 1))}
            values[names.acceptance_rate_pos("train", 1)] = rate
            scores = {CANDIDATE: LENGTH, SERVED: self._served, EARLIER: self._earlier}
            values |= {
                names.scored_acceptance_length(copy): scores[copy] * (1 + self._noise * self._rng.normal())
                for copy in plan.scored
                if copy in scores
            }
            self.metrics.append(training.observe(plan, values, GENERATE_S, COST_S if plan.train else 0.0))
            self.trained.append(plan.train)
            # The policy moves: copies lose, and a trained draft is back at the top.
            self._earlier *= 1 - self._slope(step)
            self._served = LENGTH if plan.train else self._served * (1 - self._slope(step))


def _rate(length: float) -> float:
    """Acceptance rate of each of three drafted tokens at which the acceptance length is ``length``."""
    return float(np.interp(length, [sum(rate**i for i in range(4)) for rate in RATES], RATES))


RATES = np.linspace(0, 1, 1001)
# A draft left alone for the horizon loses the seconds that training costs at this slope.
BREAK_EVEN = COST_S / GENERATE_S / HORIZON


@pytest.mark.parametrize("seed", range(5))
def test_a_draft_that_would_fall_behind_is_trained_in_every_step(seed: int) -> None:
    simulation = Simulation(lambda _: 3 * BREAK_EVEN, noise=0.01, seed=seed)
    simulation.run(AutoDraftTraining(), 100)
    assert all(simulation.trained)
    assert all(metrics[names.DRAFT_COST] == COST_S for metrics in simulation.metrics)
    gain = np.median([metrics[names.DRAFT_GAIN] for metrics in simulation.metrics])
    assert gain == pytest.approx(3 * COST_S, rel=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_a_draft_that_stays_as_good_is_seldom_trained(seed: int) -> None:
    simulation = Simulation(lambda _: 0.0, noise=0.01, seed=seed)
    simulation.run(AutoDraftTraining(), 200)
    assert all(simulation.trained[: WINDOW + 1])
    # Trials come at twice the distance each time, up to the longest rest.
    assert sum(simulation.trained[100:]) <= 2 * (WINDOW + 1)
    assert any(simulation.trained[-(LONGEST_REST + WINDOW + 1) :])


def test_a_draft_that_begins_to_fall_behind_is_trained_again_at_once() -> None:
    simulation = Simulation(lambda step: 0.0 if step < 90 else 2 * BREAK_EVEN)
    simulation.run(AutoDraftTraining(), 160)
    assert not any(simulation.trained[80:90])
    # Once it has lost what a window wins back: after half of one, and a step to notice.
    first = simulation.trained.index(True, 90)
    assert first <= 90 + WINDOW
    assert all(simulation.trained[first:])


def test_steps_that_draft_nothing_say_nothing_about_the_draft() -> None:
    training = AutoDraftTraining()

    def step(rate: float | None) -> bool:
        plan = training.plan(0)
        values = {names.scored_acceptance_length(copy): LENGTH for copy in plan.scored}
        values |= {} if rate is None else {names.acceptance_rate_pos("train", 1): rate}
        training.observe(plan, values, GENERATE_S, COST_S)
        return plan.train

    assert all(step(None) for _ in range(WINDOW + 1))
    assert not any(step(rate) for rate in (None, 0.9, None, 0.9))
    # Noticed in one step, it trains from the next.
    assert [step(0.5), step(0.5)] == [False, True]


def test_a_slowly_falling_draft_is_trained_now_and_then() -> None:
    simulation = Simulation(lambda _: 0.3 * BREAK_EVEN)
    simulation.run(AutoDraftTraining(), 300)
    share = np.mean(simulation.trained[100:])
    assert 0.1 < share < 0.7


def test_the_gain_is_that_of_the_horizon() -> None:
    simulation = Simulation(lambda _: 0.01)
    training = AutoDraftTraining()
    simulation.run(training, WINDOW + 1)
    lost_s = GENERATE_S * (1 / (1 - 0.01) ** WINDOW - 1)
    assert simulation.metrics[-1][names.DRAFT_GAIN] == pytest.approx(lost_s * HORIZON / WINDOW, rel=0.03)
    # The first step of a window has nothing to compare with.
    assert simulation.metrics[0][names.DRAFT_GAIN] == 0


def test_a_draft_that_got_worse_is_set_back() -> None:
    training = AutoDraftTraining()

    def scores(candidate: float, served: float) -> dict[str, float]:
        return {names.scored_acceptance_length(CANDIDATE): candidate, names.scored_acceptance_length(SERVED): served}

    assert training.must_undo(scores(1.5, 3.0))
    assert not training.must_undo(scores(3.2, 3.0))
    # Within the noise of one micro-batch.
    assert not training.must_undo(scores(2.99, 3.0))
    assert not training.must_undo(scores(float("nan"), float("nan")))
    assert not training.must_undo({})
    assert not DraftTraining(1).must_undo(scores(1.5, 3.0))


def test_a_step_without_scores_tells_nothing() -> None:
    training, gains = AutoDraftTraining(), []
    for step in range(4):
        plan = training.plan(step)
        served, earlier = (float("nan"), 2.0) if step == 2 else (3.0, 2.0)
        values = {names.scored_acceptance_length(SERVED): served, names.scored_acceptance_length(EARLIER): earlier}
        gains.append(training.observe(plan, values, GENERATE_S, COST_S)[names.DRAFT_GAIN])
    assert gains[2] == gains[1] > 0
    assert np.isfinite(gains[3])


def test_a_resumed_run_goes_on_with_its_rest() -> None:
    simulation, training = Simulation(lambda _: 0.0), AutoDraftTraining()
    simulation.run(training, WINDOW + 3)
    resumed = AutoDraftTraining()
    resumed.load_state_dict(training.state_dict())
    again = Simulation(lambda _: 0.0)
    again.run(resumed, WINDOW)
    simulation.run(training, WINDOW)
    assert again.trained == simulation.trained[-WINDOW:]
    assert not all(again.trained)
    # A checkpoint of a run with another setting.
    fresh = AutoDraftTraining()
    fresh.load_state_dict({})
    assert fresh.plan(0).train


def test_steps_at_an_interval() -> None:
    every, never = build_draft_training("every:3", has_draft=True), build_draft_training("off", has_draft=True)
    assert [every.plan(step).train for step in range(5)] == [True, False, False, True, False]
    assert not any(never.plan(step).train for step in range(5))
    assert not build_draft_training("auto", has_draft=False).plan(0).train
    assert build_draft_training("auto", has_draft=True).plan(0).train
