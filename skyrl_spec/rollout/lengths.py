"""How many tokens an engine drafts in a step: the number that gives most tokens per second at its batch size.

    tokens of a step, for a request    1 + the acceptance rates of the drafted positions
    seconds of a step                  measured, by batch size and length (``step_times``)

Both change: the acceptance with every weight sync, the batch while a rollout runs dry. The plan is made anew every few
steps. A few trial steps of other lengths keep what it rests on up to date; they may cost a hundredth of the time.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from skyrl_spec.rollout.step_times import OFF, EngineStep, StepTimes

# Drafts after which an acceptance rate is half forgotten, and the share that a weight sync leaves.
_WINDOW, _KEPT_AT_SYNC = 4096, 0.1
# Accepted share of a position before anything is known about it, and how many drafts that counts for.
_FIRST_GUESS, _GUESS_WEIGHT = 0.7, 8.0
# A length in use gives way to one that is better by this share.
_HYSTERESIS = 0.02
# Share of the time that trials may cost, and how many steps' time is saved up for them at most.
_TRIAL_SHARE, _MOST_CREDIT = 0.01, 16.0
# Share of what is known about the batches of rollouts that each new rollout leaves.
_KEPT_OF_ROLLOUTS = 0.7
# Steps of a trial. The first still verifies drafts of the length in use, and only the others are timed.
_TRIAL_STEPS = 4
_STEPS_BETWEEN_PLANS, _STEPS_BETWEEN_TRIALS = 8, 24
# A length that was not tried for so many steps is next, and others wait until it can be paid.
_LONG_UNTRIED = 1000
# Steps at the beginning of a rollout that draft this many tokens, to see if drafting pays again.
_PROBE_STEPS, _PROBE_LENGTH = 24, 2
# Share of the time that a probe may lose, and the steps over which the mean time of a step is taken.
_LOST_IN_A_PROBE, _STEPS_OF_MEAN = 0.5, 500


class Lengths(Protocol):
    """Number of tokens to draft, by batch size, decided step by step."""

    def begin(self) -> None:
        """An engine without requests gets some."""

    def choose(self, batch_size: int) -> int:
        """Number of tokens to draft in the next step, or ``OFF``."""

    def observe(self, step: EngineStep) -> None:
        """Takes in a finished step."""

    def weights_changed(self) -> None:
        """The engine got other weights, and dropped all keys."""

    def cache_was_reset(self) -> None:
        """The engine dropped all keys."""

    def planned(self) -> list[int]:
        """Length for batch size 1, 2, ..."""

    def expected(self, batch_size: int) -> tuple[float, float]:
        """Tokens per second of the whole batch at the planned length, and without a draft. nan: not known."""


class LengthTable:
    """Lengths that do not change."""

    def __init__(self, lengths_B: list[int]):
        self._lengths_B = lengths_B

    def begin(self) -> None: ...

    def choose(self, batch_size: int) -> int:
        return self._lengths_B[batch_size - 1]

    def observe(self, step: EngineStep) -> None: ...

    def weights_changed(self) -> None: ...

    def cache_was_reset(self) -> None: ...

    def planned(self) -> list[int]:
        return list(self._lengths_B)

    def expected(self, batch_size: int) -> tuple[float, float]:
        return float("nan"), float("nan")


class StepLog:
    """Sums over steps by batch size, in bins from one power of two to the next."""

    def __init__(self, largest: int, most: int):
        num_bins = largest.bit_length()
        # Column 0 is OFF.
        self._steps_SL = np.zeros((num_bins, most + 2), np.int64)
        # Of timed steps: seconds, tokens, and the tokens expected at the planned length and without a draft.
        self._sums_S4 = np.zeros((num_bins, 4))

    def add(self, step: EngineStep, expected: tuple[float, float]) -> None:
        """Adds a step. ``expected``: tokens per second at the planned length, and without a draft."""
        index = step.batch_size.bit_length() - 1
        self._steps_SL[index, step.drafted + 1] += 1
        if step.seconds is not None:
            tokens = step.batch_size + step.accepted_per_pos.sum()
            self._sums_S4[index] += (step.seconds, tokens, *(step.seconds * rate for rate in expected))

    def as_lists(self) -> dict[str, list[Any]]:
        """The fields of ``types.LengthLog``."""
        names = ("seconds", "tokens", "expected_tokens", "plain_tokens")
        columns = self._sums_S4.T.tolist()
        return {"steps": self._steps_SL.tolist()} | dict(zip(names, columns, strict=True))


class Acceptance:
    """Rates at which drafted positions are accepted, mostly from the last few thousand drafts."""

    def __init__(self, most: int):
        self._reached_K, self._accepted_K = np.zeros(most), np.zeros(most)

    def add(self, drafted_per_pos: np.ndarray, accepted_per_pos: np.ndarray) -> None:
        # A position is reached if the one before was accepted. Drafts of a step have one length, except the last few
        # of a response.
        before = np.concatenate([drafted_per_pos[:1], accepted_per_pos[:-1]])
        self._reached_K += np.minimum(before, drafted_per_pos)
        self._accepted_K += accepted_per_pos
        if self._reached_K[0] > _WINDOW:
            self.forget(0.5)

    def forget(self, kept: float) -> None:
        """Gives what is known the weight ``kept`` against what is still to come."""
        self._reached_K *= kept
        self._accepted_K *= kept

    def rates(self) -> np.ndarray:
        """``[K]``: share of drafts whose first 1, 2, ... tokens are accepted. An unknown position is like the last."""
        conditional_K, guess = np.empty_like(self._reached_K), _FIRST_GUESS
        for index, (reached, accepted) in enumerate(zip(self._reached_K, self._accepted_K, strict=True)):
            guess = conditional_K[index] = (accepted + _GUESS_WEIGHT * guess) / (reached + _GUESS_WEIGHT)
        return np.cumprod(conditional_K)


class AutoLengths:
    """Lengths chosen by measured step times and acceptance.

    ``times`` has the length 0 and others, and ``OFF`` for a draft with a model. At a batch where no draft pays, the
    drafter still runs its first pass (length 0): otherwise the draft would lack the keys of these tokens once the batch
    is smaller. That has its price. If rollouts as the last few were would be faster without any draft, the drafter is
    ``OFF`` until all keys are dropped: requests to come may find keys of the policy in the prefix cache, where those of
    the draft are missing. Now and then the beginning of a rollout is a probe, which shows whether drafts pay again.
    """

    def __init__(self, times: StepTimes, largest: int):
        self.times, self.acceptance = times, Acceptance(max(times.lengths))
        self._lengths_L, self._batch_sizes = np.array(times.lengths), np.arange(1, largest + 1)
        # Seconds that trials and probes may still cost.
        self._credit_s, self._mean_step_s = 0.0, 0.0
        self._num_steps, self._next_trial = 0, _STEPS_BETWEEN_TRIALS
        self._trial_length, self._trial_left, self._probe_left = OFF, 0, 0
        self._lacks_keys = False
        # Tokens of a request that rollouts generated at each batch size, mostly of the last few.
        self._tokens_B = np.ones(largest)
        # Number of steps at the last trial of each length.
        self._tried_L = np.zeros(len(times.lengths))
        # Index of the length in use at each batch size.
        self._plan_B = np.full(largest, OFF)
        self._rates_BL = self._rates()
        self._plan_B = self._best()

    def begin(self) -> None:
        self._probe_left = 0
        self._tokens_B = 1 + _KEPT_OF_ROLLOUTS * (self._tokens_B - 1)
        is_off = self._lengths_L[self._plan_B[-1]] == OFF
        if is_off and not self._lacks_keys and self._credit_s >= _PROBE_STEPS * _LOST_IN_A_PROBE * self._mean_step_s:
            self._probe_left = _PROBE_STEPS

    def choose(self, batch_size: int) -> int:
        if self._probe_left > 0:
            self._probe_left -= 1
            return self.times.lengths[self._index(_PROBE_LENGTH)]
        planned = self._planned(batch_size)
        if self._lacks_keys or planned == OFF:
            self._lacks_keys = True
            return OFF
        if self._trial_left > 0:
            self._trial_left -= 1
            return self._trial_length
        return planned

    def observe(self, step: EngineStep) -> None:
        if step.verified > 0 and not self._lacks_keys:
            self.acceptance.add(step.drafted_per_pos, step.accepted_per_pos)
        if step.seconds is None:
            return
        self._pay(step.batch_size, step.drafted, step.seconds)
        self._tokens_B[step.batch_size - 1] += 1 + step.accepted_per_pos.sum() / step.batch_size
        is_planned = step.drafted == self._planned(step.batch_size)
        if step.is_steady:
            self.times.observe(step.batch_size, step.drafted, step.seconds, is_trial=not is_planned)
        self._num_steps += 1
        if self._num_steps % _STEPS_BETWEEN_PLANS == 0:
            self._rates_BL = self._rates()
            self._plan_B = self._best()
        if self._num_steps >= self._next_trial and is_planned and step.drafted != OFF:
            self._begin_trial(step.batch_size, step.seconds)

    def weights_changed(self) -> None:
        self.acceptance.forget(_KEPT_AT_SYNC)
        self.cache_was_reset()

    def cache_was_reset(self) -> None:
        self._lacks_keys = False

    def planned(self) -> list[int]:
        return self._lengths_L[self._plan_B].tolist()

    def expected(self, batch_size: int) -> tuple[float, float]:
        rates_L = self._rates_BL[batch_size - 1] * batch_size
        # The first length is OFF, or 0 for a draft without a model.
        return float(rates_L[self._plan_B[batch_size - 1]]), float(rates_L[0])

    def _planned(self, batch_size: int) -> int:
        return int(self._lengths_L[self._plan_B[batch_size - 1]])

    def _index(self, length: int) -> int:
        """Index of ``length``, or of the longest if that is shorter."""
        return self.times.lengths.index(min(length, self.times.lengths[-1]))

    def _rates(self) -> np.ndarray:
        """``[B, L]``: tokens per second of a request."""
        tokens_K = np.concatenate([[1.0], 1.0 + np.cumsum(self.acceptance.rates())])
        return tokens_K[np.maximum(self._lengths_L, 0)] / self.times.convex_seconds(self._batch_sizes)

    def _best(self) -> np.ndarray:
        """``[B]``: index of the length to use at each batch size."""
        in_use_BL = np.arange(len(self._lengths_L)) == self._plan_B[:, None]
        rates_BL = self._rates_BL * np.where(in_use_BL, 1 + _HYSTERESIS, 1)
        is_off_L = self._lengths_L == OFF
        best_B = np.where(is_off_L, -np.inf, rates_BL).argmax(axis=1)
        off_B = np.full_like(best_B, is_off_L.argmax())
        # Over a whole rollout: keys that are missing cannot be made up for.
        on_s, off_s = (
            (self._tokens_B / np.take_along_axis(rates_BL, index_B[:, None], 1)[:, 0]).sum()
            for index_B in (best_B, off_B)
        )
        return off_B if is_off_L.any() and off_s < on_s else best_B

    def _pay(self, batch_size: int, length: int, seconds: float) -> None:
        """Adds a step's share to what trials may cost, and subtracts what it lost to the length in use."""
        loss = _loss(self._rates_BL[batch_size - 1], self._plan_B[batch_size - 1], self.times.lengths.index(length))
        self._mean_step_s += (seconds - self._mean_step_s) / min(self._num_steps + 1, _STEPS_OF_MEAN)
        earned_s = (_TRIAL_SHARE - loss) * seconds
        self._credit_s = min(max(self._credit_s + earned_s, 0.0), _MOST_CREDIT * self._mean_step_s)

    def _begin_trial(self, batch_size: int, seconds: float) -> None:
        """Tries the length that was tried longest ago, of those that the credit allows.

        Cheap trials would use up all credit, and a length that is wrongly believed to be dear would never be tried.
        """
        rates_L, planned = self._rates_BL[batch_size - 1], self._plan_B[batch_size - 1]
        prices_L = np.array([_loss(rates_L, planned, index) for index in range(len(rates_L))]) * _TRIAL_STEPS * seconds
        others_L = self._lengths_L != OFF
        others_L[planned] = False
        affordable_L = others_L & (prices_L <= self._credit_s)
        overdue_L = others_L & (self._num_steps - self._tried_L > _LONG_UNTRIED)
        among_L = overdue_L if overdue_L.any() else affordable_L
        chosen = int(np.where(among_L, self._tried_L, np.inf).argmin())
        if not affordable_L[chosen]:
            self._next_trial = self._num_steps + _STEPS_BETWEEN_PLANS
            return
        self._tried_L[chosen] = self._num_steps
        self._trial_length, self._trial_left = self.times.lengths[chosen], _TRIAL_STEPS
        self._next_trial = self._num_steps + _STEPS_BETWEEN_TRIALS


def _loss(rates_L: np.ndarray, planned: int, index: int) -> float:
    """Share of the tokens per second that a length gives away against the one in use."""
    return max(0.0, 1.0 - float(rates_L[index] / rates_L[planned]))
