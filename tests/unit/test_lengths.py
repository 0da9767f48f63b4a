"""Choosing how many tokens to draft, on a simulated engine: step times and acceptance are known functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from skyrl_spec.rollout.lengths import Acceptance, AutoLengths, LengthTable, StepLog
from skyrl_spec.rollout.step_times import (
    OFF,
    Calibration,
    EngineStep,
    StepTimes,
    between,
    convex,
    lengths_to_measure,
    lengths_to_try,
    sizes_to_measure,
)
from skyrl_spec.settings.schedule import dense_table

MOST, LARGEST = 7, 128
# Milliseconds of a step: fixed part, each verified token, first pass of the drafter, each further token drafted.
TIMES = {"base": 2.0, "token": 0.02, "first": 0.4, "further": 0.3}
Conditional = Callable[[int], float]


@dataclass
class SimulatedEngine:
    """An engine with known step times. ``conditional(position)`` is the chance of a position once it is reached."""

    conditional: Conditional
    times: dict[str, float] = field(default_factory=lambda: dict(TIMES))
    noise: float = 0.05
    # Factor of all times: another program on the same machine.
    slowdown: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.last = OFF
        # Time and tokens so far.
        self.seconds, self.tokens = 0.0, 0.0

    def mean_seconds(self, batch_size: int, verified: int, drafted: int) -> float:
        tokens = batch_size * (1 + max(verified, 0))
        draft = 0.0 if drafted == OFF else self.times["first"] + self.times["further"] * drafted
        return 1e-3 * self.slowdown * (self.times["base"] + self.times["token"] * tokens + draft)

    def best_rate(self, batch_size: int, lengths: list[int]) -> tuple[float, int]:
        """Tokens per second of a request at the best fixed length, and this length."""
        return max((self.rate(batch_size, length), length) for length in lengths)

    def rate(self, batch_size: int, length: int) -> float:
        return self.tokens_of(length) / self.mean_seconds(batch_size, length, length)

    def tokens_of(self, length: int) -> float:
        chances = np.cumprod([self.conditional(position) for position in range(1, max(length, 0) + 1)])
        return 1 + float(np.sum(chances))

    def step(self, lengths: AutoLengths | LengthTable, batch_size: int) -> EngineStep:
        drafted = lengths.choose(batch_size)
        verified, self.last = self.last, drafted
        seconds = self.mean_seconds(batch_size, verified, drafted) * self.random.lognormal(0, self.noise)
        drafts, accepted = np.zeros(MOST, np.int64), np.zeros(MOST, np.int64)
        alive = batch_size
        for position in range(1, max(verified, 0) + 1):
            drafts[position - 1] = batch_size
            alive = accepted[position - 1] = self.random.binomial(alive, self.conditional(position))
        step = EngineStep(batch_size, verified, drafted, seconds, drafts, accepted)
        lengths.observe(step)
        self.seconds += seconds
        self.tokens += 1 + accepted.sum() / batch_size
        return step

    def step_times(self) -> StepTimes:
        lengths, sizes = lengths_to_try(MOST, has_model=True), sizes_to_measure(LARGEST)
        measured = lengths_to_measure(lengths)
        seconds = [[self.mean_seconds(size, length, length) for length in measured] for size in sizes]
        return StepTimes(sizes, lengths, between(lengths, measured, np.array(seconds)))


def often(position: int) -> float:
    return 0.95


def rarely(position: int) -> float:
    return 0.3


def never(position: int) -> float:
    return 0.0


@pytest.mark.parametrize("conditional", [often, rarely, never, lambda position: 0.9 if position < 4 else 0.1])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 100, 128])
def test_it_finds_the_length_with_most_tokens_per_second(conditional: Conditional, batch_size: int) -> None:
    engine = SimulatedEngine(conditional)
    lengths = AutoLengths(engine.step_times(), LARGEST)
    lengths.begin()
    for _ in range(400):
        engine.step(lengths, batch_size)
    engine.seconds = engine.tokens = 0.0
    for _ in range(2000):
        engine.step(lengths, batch_size)
    # All fixed lengths, and no draft at all.
    best, _ = engine.best_rate(batch_size, lengths.times.lengths)
    assert engine.tokens / engine.seconds > 0.97 * best


def test_the_length_follows_the_batch() -> None:
    engine = SimulatedEngine(lambda position: 0.8, noise=0.0)
    lengths = AutoLengths(engine.step_times(), LARGEST)
    for _ in range(300):
        engine.step(lengths, 8)
    planned = lengths.planned()
    for batch_size in (1, 8, 32, 128):
        best, length = engine.best_rate(batch_size, lengths.times.lengths)
        assert engine.rate(batch_size, planned[batch_size - 1]) > 0.97 * best, (batch_size, length)
    assert planned[0] > planned[-1] >= 0


def test_a_decaying_batch_takes_hardly_longer_than_with_the_best_length_at_each_size() -> None:
    """The shape of a rollout: 128 responses whose lengths are log-normal."""
    ends = np.sort(np.random.default_rng(1).lognormal(np.log(100), 1.0, 128).astype(int) + 1)

    def rollout(engine: SimulatedEngine, lengths: AutoLengths | LengthTable) -> None:
        lengths.cache_was_reset()
        lengths.begin()
        engine.last, position = OFF, 0.0
        while position < ends[-1]:
            tokens = engine.tokens
            engine.step(lengths, int((ends > position).sum()))
            position += engine.tokens - tokens

    def seconds(lengths_of: Callable[[SimulatedEngine], AutoLengths | LengthTable]) -> float:
        # A verified token is dear, so that short drafts pay for many requests and long ones for few.
        engine = SimulatedEngine(lambda position: 0.85, times=TIMES | {"token": 0.05})
        lengths = lengths_of(engine)
        for _ in range(3):
            rollout(engine, lengths)
        engine.seconds = 0.0
        for _ in range(5):
            rollout(engine, lengths)
        return engine.seconds

    auto = seconds(lambda engine: AutoLengths(engine.step_times(), LARGEST))
    fixed = [seconds(lambda _, length=length: LengthTable([length] * LARGEST)) for length in range(MOST + 1)]
    engine = SimulatedEngine(lambda position: 0.85, times=TIMES | {"token": 0.05})
    best = [engine.best_rate(size, list(range(MOST + 1)))[1] for size in range(1, LARGEST + 1)]
    ideal = seconds(lambda _: LengthTable(best))
    # Trials may cost a hundredth.
    assert auto < 1.02 * ideal < 1.02 * min(fixed)
    assert auto < min(fixed)


def test_a_draft_that_begins_to_pay_is_found_and_one_that_stops_is_left() -> None:
    chance = {"now": 0.0}
    engine = SimulatedEngine(lambda position: chance["now"])
    lengths = AutoLengths(engine.step_times(), LARGEST)

    def rollouts(number: int) -> None:
        for _ in range(number):
            lengths.cache_was_reset()
            lengths.begin()
            engine.last = OFF
            for _ in range(100):
                engine.step(lengths, 16)

    rollouts(20)
    assert lengths.planned()[15] == OFF
    engine.seconds = engine.tokens = 0.0
    rollouts(40)
    assert engine.tokens / engine.seconds > 0.97 * engine.rate(16, OFF), "probes cost too much"
    chance["now"] = 0.95
    lengths.weights_changed()
    rollouts(40)
    assert lengths.planned()[15] >= MOST - 1
    chance["now"] = 0.0
    lengths.weights_changed()
    rollouts(5)
    assert lengths.planned()[15] == OFF


def test_a_machine_that_slows_down_changes_no_length() -> None:
    engine = SimulatedEngine(often, noise=0.02)
    lengths = AutoLengths(engine.step_times(), LARGEST)
    for _ in range(300):
        engine.step(lengths, 16)
    before, (rate, plain) = lengths.planned(), lengths.expected(16)
    assert plain == pytest.approx(16 * engine.rate(16, OFF), rel=0.1)
    engine.slowdown = 3.0
    for _ in range(300):
        engine.step(lengths, 16)
    assert lengths.planned()[:16] == before[:16]
    assert lengths.expected(16)[0] == pytest.approx(rate / 3, rel=0.1)


def test_step_times_that_were_wrong_are_put_right_by_trials() -> None:
    engine = SimulatedEngine(lambda position: 0.8, noise=0.02)
    right = engine.step_times()
    wrong = right.seconds(np.array(right.sizes))
    # The calibration saw further drafted tokens at a fifth of their cost.
    one = right.lengths.index(1)
    wrong[:, one:] = wrong[:, [one]] + 0.2 * (wrong[:, one:] - wrong[:, [one]])
    lengths = AutoLengths(StepTimes(right.sizes, right.lengths, wrong), LARGEST)
    best, _ = engine.best_rate(64, right.lengths)
    assert engine.rate(64, lengths.planned()[63]) < 0.9 * best
    for _ in range(1500):
        engine.step(lengths, 64)
    assert engine.rate(64, lengths.planned()[63]) > 0.97 * best


def test_lengths_that_looked_dear_are_tried_too() -> None:
    engine = SimulatedEngine(often, noise=0.02)
    right = engine.step_times()
    wrong = right.seconds(np.array(right.sizes))
    # The calibration saw further drafted tokens at three times their cost.
    one = right.lengths.index(1)
    wrong[:, one:] = wrong[:, [one]] + 3.0 * (wrong[:, one:] - wrong[:, [one]])
    lengths = AutoLengths(StepTimes(right.sizes, right.lengths, wrong), LARGEST)
    best, _ = engine.best_rate(64, right.lengths)
    assert engine.rate(64, lengths.planned()[63]) < 0.9 * best
    for _ in range(6000):
        engine.step(lengths, 64)
    assert engine.rate(64, lengths.planned()[63]) > 0.97 * best


def test_a_drafter_that_was_off_stays_off_until_keys_are_dropped() -> None:
    """The next turn of a response finds the policy's keys in the prefix cache, and not the draft's."""
    chance = {"now": 0.0}
    engine = SimulatedEngine(lambda position: chance["now"])
    lengths = AutoLengths(engine.step_times(), LARGEST)
    for _ in range(100):
        engine.step(lengths, 16)
    assert lengths.planned()[15] == OFF
    lengths.begin()
    assert {engine.step(lengths, size).drafted for size in (16, 8, 1)} == {OFF}
    # Drafts of that time would say nothing about the draft.
    before = lengths.acceptance.rates()
    lengths.begin()
    lengths.observe(EngineStep(4, 2, OFF, 1e-3, np.full(MOST, 4), np.zeros(MOST, np.int64)))
    np.testing.assert_array_equal(lengths.acceptance.rates(), before)
    lengths.cache_was_reset()
    lengths.begin()
    lengths._credit_s, lengths._plan_B[:] = 1.0, lengths._index(2)
    assert engine.step(lengths, 16).drafted >= 0


def test_keys_are_kept_where_a_smaller_batch_drafts() -> None:
    """Length 0, not OFF, while the batch is too large for drafts: the rest of the rollout needs the draft's keys."""
    engine = SimulatedEngine(lambda position: 0.5, times=TIMES | {"token": 0.05})
    lengths = AutoLengths(engine.step_times(), LARGEST)
    for _ in range(300):
        engine.step(lengths, 4)
    assert lengths.planned()[0] > 0
    assert lengths.planned()[-1] == 0


@pytest.mark.parametrize(("tail", "drafts"), [(2, False), (400, True)])
def test_the_drafter_is_off_where_small_batches_are_too_rare(tail: int, drafts: bool) -> None:
    """Keys for the end of a rollout cost a first pass in every step before it."""
    engine = SimulatedEngine(lambda position: 0.7, times=TIMES | {"token": 0.05}, noise=0.02)
    lengths = AutoLengths(engine.step_times(), LARGEST)

    def rollout(lengths: AutoLengths | LengthTable) -> None:
        lengths.cache_was_reset()
        lengths.begin()
        engine.last = OFF
        for batch_size, num_tokens in ((128, 100), (2, tail)):
            end = engine.tokens + num_tokens
            while engine.tokens < end:
                engine.step(lengths, batch_size)

    def seconds(lengths: AutoLengths | LengthTable) -> float:
        engine.seconds = 0.0
        for _ in range(5):
            rollout(lengths)
        return engine.seconds

    seconds(lengths)
    assert (lengths.planned()[1] > 0, lengths.planned()[-1]) == ((True, 0) if drafts else (False, OFF))
    length = engine.best_rate(2, list(range(MOST + 1)))[1]
    others = [LengthTable([OFF] * LARGEST), LengthTable([length] * 64 + [0] * 64)]
    assert seconds(lengths) < 1.03 * min(seconds(other) for other in others)


def test_acceptance_of_positions_that_were_not_drafted_is_that_of_the_last_one() -> None:
    acceptance = Acceptance(4)
    for _ in range(1000):
        acceptance.add(np.array([10, 10, 0, 0]), np.array([8, 4, 0, 0]))
    np.testing.assert_allclose(acceptance.rates(), [0.8, 0.4, 0.2, 0.1], rtol=0.01)


def test_calibration_measures_ratios_on_a_machine_that_changes_its_speed() -> None:
    lengths = lengths_to_try(MOST, has_model=True)
    engine = SimulatedEngine(never, noise=0.01)
    calibration, last = Calibration(8, lengths), OFF
    for number in range(10_000):
        if calibration.is_done:
            break
        # Twice as slow from the second round on.
        engine.slowdown = 1.0 if number < 2 * len(lengths) else 2.0
        length = calibration.choose()
        seconds = engine.mean_seconds(8, last, length) * engine.random.lognormal(0, engine.noise)
        calibration.observe(EngineStep(8, last, length, seconds, np.zeros(MOST), np.zeros(MOST)))
        last = length
    assert calibration.is_done
    assert not calibration.has_failed
    expected = np.array([engine.mean_seconds(8, length, length) for length in lengths])
    ratios = calibration.seconds() / expected
    np.testing.assert_allclose(ratios / ratios.mean(), 1, atol=0.05)


def test_calibration_gives_up_a_batch_that_never_comes() -> None:
    calibration = Calibration(8, [OFF, 0, 1])
    for _ in range(1000):
        if calibration.is_done:
            break
        length = calibration.choose()
        calibration.observe(EngineStep(7, length, length, 1.0, np.zeros(1), np.zeros(1)))
    assert calibration.has_failed


def test_lengths_to_try() -> None:
    assert lengths_to_try(3, has_model=True) == [OFF, 0, 1, 2, 3]
    assert lengths_to_try(3, has_model=False) == [0, 1, 2, 3]
    assert lengths_to_try(15, has_model=False) == [*range(9), 10, 12, 14, 15]
    assert sizes_to_measure(100) == [1, 4, 16, 64, 100]
    assert sizes_to_measure(64) == [1, 4, 16, 64]
    assert sizes_to_measure(1) == [1]


@pytest.mark.parametrize("has_model", [True, False])
def test_lengths_to_measure(has_model: bool) -> None:
    expected = {1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 3], 7: [0, 1, 3, 5, 7], 8: [0, 1, 3, 5, 7, 8]}
    for most, lengths in expected.items():
        tried = lengths_to_try(most, has_model=has_model)
        assert lengths_to_measure(tried) == ([OFF] if has_model else []) + lengths
    assert lengths_to_measure(lengths_to_try(15, has_model=False)) == [0, 1, 3, 5, 7, 10, 14, 15]


def test_lengths_that_are_not_measured_are_between_their_neighbours() -> None:
    found = between([OFF, 0, 1, 2, 3], [OFF, 0, 1, 3], np.array([[1.0, 2.0, 4.0, 6.0], [1.0, 1.0, 1.0, 2.0]]))
    np.testing.assert_allclose(found, [[1, 2, 4, 5, 6], [1, 1, 1, 1.5, 2]])


def test_convex_times_stay_as_they_are() -> None:
    lengths = lengths_to_try(7, has_model=True)
    for seconds in ([9, 10, 11, 12, 13, 14, 15, 16, 17], [9, 8, 5, 5, 5, 6, 8, 11, 20]):
        np.testing.assert_allclose(convex(lengths, np.array(seconds, float)), seconds, rtol=1e-12)
    # One length, or none, has no neighbour.
    for seconds in ([3, 1], [3, 1, 2]):
        np.testing.assert_array_equal(convex([-1, 0, 1][-len(seconds) :], np.array(seconds, float)), seconds)


@pytest.mark.parametrize("seed", range(20))
def test_times_that_are_noisy_are_held_to_rising_costs(seed: int) -> None:
    rng, lengths = np.random.default_rng(seed), lengths_to_try(7, has_model=True)
    true_L = 20.0 + 6 * np.maximum(lengths, 0) + np.maximum(np.array(lengths) - 4, 0)
    noisy_L = true_L * (1 + 0.1 * rng.normal(size=len(lengths)))
    held_L = convex(lengths, noisy_L)
    slopes = np.diff(held_L[2:])
    assert (slopes >= 0).all()
    assert (np.diff(slopes) >= -1e-9).all()
    # Nearer to the truth than what was measured.
    errors = [np.square(values_L / true_L - 1)[2:].sum() for values_L in (held_L, noisy_L)]
    assert errors[0] < errors[1]


def test_a_length_that_looked_cheap_by_chance_is_not_chosen() -> None:
    lengths = lengths_to_try(7, has_model=True)
    # Milliseconds of steps of 64 responses on two cores, as they were measured: 7 tokens are dearer than 5, of course.
    measured_L = np.array([22.1, 23.2, 28.2, 37.4, 46.7, 55.7, 64.6, 63.7, 62.8]) / 1e3
    rates_L = np.array([0, 0, 0.9, 1.6, 2.1, 2.5, 2.9, 3.2, 3.5]) + 1
    times = StepTimes([64], lengths, measured_L[None])
    chosen = [
        lengths[int((rates_L / seconds_L).argmax())]
        for seconds_L in (measured_L, times.convex_seconds(np.array([64]))[0])
    ]
    assert chosen[0] == 7
    assert chosen[1] < 7


def test_a_table_has_a_length_for_every_batch_size() -> None:
    assert dense_table([[2, 3, 5], [6, 7, 1]], 9) == [5, 5, 5, 5, 5, 1, 1, 1, 1]
    assert LengthTable(dense_table([[1, 4, 3]], 8)).planned() == [3] * 8


def test_the_log_counts_steps_by_batch_and_length() -> None:
    log = StepLog(9, 2)
    nothing = np.zeros(2, np.int64)
    log.add(EngineStep(9, 2, 2, 0.5, np.array([9, 9]), np.array([6, 3])), (40.0, 20.0))
    log.add(EngineStep(8, OFF, OFF, None, nothing, nothing), (40.0, 20.0))
    log.add(EngineStep(1, 0, 0, 0.25, nothing, nothing), (4.0, 2.0))
    lists = log.as_lists()
    assert lists["steps"] == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert lists["seconds"] == [0.25, 0, 0, 0.5]
    assert lists["tokens"] == [1, 0, 0, 18]
    assert lists["expected_tokens"] == [1, 0, 0, 20]
    assert lists["plain_tokens"] == [0.5, 0, 0, 10]
