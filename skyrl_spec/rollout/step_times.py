"""Seconds of an engine's decode step, by batch size and number of drafted tokens.

    calibration   a few steps of some lengths at every power of four, taken in turns; others by linear interpolation
    running steps keep the level at the machine's present speed, and trial steps keep the ratios between lengths

A few steps are a noisy measurement, and the length that seems cheapest by chance would be chosen. But a step takes
longer the more it drafts, and every further token costs at least as much as the one before: the policy verifies it, and
a head runs once more for it. ``convex`` holds the times to that.

Only ratios decide which length pays. Shared machines change their speed all the time, and a step of the length in use
cannot tell a slower machine from a slower length. So it moves all lengths together. A step of another length, in
between steps of the one in use, moves that length alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

# Not even the first pass of the drafter runs. Nothing is drafted, and the draft lacks the keys of these tokens later.
OFF = -1
# Share of a deviation by which one step moves an estimate, and the largest deviation that counts (of the logarithm).
_RATE, _LARGEST = 0.1, 0.5
# Steps of a length in a row while calibrating. The first verifies drafts of the length before, and does not count.
_STEPS_IN_A_ROW = 2
_ROUNDS = 3
# Rounds, as a multiple of the usual number, after which a batch size is given up.
_PATIENCE = 5
# Lengths up to this one are all tried. Above it, about every fourth power of two is.
_EVERY_LENGTH_UP_TO = 8


class EngineStep(NamedTuple):
    """A step of an engine. ``drafted`` is the length it was told to draft, ``verified`` that of the step before."""

    batch_size: int
    verified: int
    drafted: int
    # None: not a pure decode step, or the first after a pause.
    seconds: float | None
    # Drafts that had at least 1, 2, ... tokens, and of these, drafts of which as many were accepted.
    drafted_per_pos: np.ndarray
    accepted_per_pos: np.ndarray

    @property
    def is_steady(self) -> bool:
        """Whether the step verified and drafted the same number of tokens."""
        return self.seconds is not None and self.verified == self.drafted


def lengths_to_try(most: int, *, has_model: bool) -> list[int]:
    """Numbers of drafted tokens to choose from, ascending: 0 to ``most``, and ``OFF`` if the draft ``has_model``."""
    lengths = {*range(min(most, _EVERY_LENGTH_UP_TO) + 1), most} | ({OFF} if has_model else set())
    step = _EVERY_LENGTH_UP_TO
    while step < most:
        lengths |= {length for length in (step, step * 5 // 4, step * 3 // 2, step * 7 // 4) if length <= most}
        step *= 2
    return sorted(lengths)


def lengths_to_measure(lengths: Sequence[int]) -> list[int]:
    """Lengths that a calibration measures: ``lengths`` up to 1, every second one above, and the longest."""
    longer = [length for length in lengths if length > 1]
    return [length for length in lengths if length <= 1] + sorted({*longer[1::2], *longer[-1:]})


def sizes_to_measure(largest: int) -> list[int]:
    """Powers of four up to ``largest``, and ``largest``."""
    return sorted({*(4**power for power in range(largest.bit_length()) if 4**power <= largest), largest})


def between(lengths: Sequence[int], measured: Sequence[int], seconds_SM: np.ndarray) -> np.ndarray:
    """``[S, L]``: seconds for all ``lengths``, linear between the ``measured`` ones."""
    return np.stack([np.interp(lengths, measured, seconds_M) for seconds_M in seconds_SM])


def convex(lengths: Sequence[int], seconds_L: np.ndarray) -> np.ndarray:
    """``[L]``: the times nearest to ``seconds_L`` that rise from length 1 on, and by no less for each further token.

    Nearest by the squares of relative differences. Times of lengths below 1 stay as they are.
    """
    drafted = np.array([length for length in lengths if length >= 1], float)
    seconds_N = np.asarray(seconds_L, float)[-len(drafted) :]
    # A positive sum of the fixed time and of times that begin to rise at one of the lengths.
    rises_NN = np.maximum(drafted[:, None] - drafted[None, :-1], 0.0)
    parts_NN = np.concatenate([np.ones((len(drafted), 1)), rises_NN], axis=1)
    weights_N, _ = nnls(parts_NN / seconds_N[:, None], np.ones(len(drafted)))
    return np.concatenate([seconds_L[: -len(drafted)], parts_NN @ weights_N])


class StepTimes:
    """Seconds of a step for ``sizes`` of a batch and ``lengths`` of a draft; linear between two sizes."""

    def __init__(self, sizes: Sequence[int], lengths: Sequence[int], seconds_SL: np.ndarray):
        self.sizes, self.lengths = np.array(sizes), list(lengths)
        self._log_SL = np.log(seconds_SL)

    def convex_seconds(self, batch_sizes: np.ndarray) -> np.ndarray:
        """``seconds``, of times that are ``convex`` at every measured size."""
        rows = [convex(self.lengths, seconds_L) for seconds_L in np.exp(self._log_SL)]
        return self._between_sizes(np.stack(rows), batch_sizes)

    def seconds(self, batch_sizes: np.ndarray) -> np.ndarray:
        """``[B, L]``: seconds of a step at each batch size, for each length."""
        return self._between_sizes(np.exp(self._log_SL), batch_sizes)

    def _between_sizes(self, seconds_SL: np.ndarray, batch_sizes: np.ndarray) -> np.ndarray:
        low_B, weight_B = self._place(batch_sizes)
        high_B = np.minimum(low_B + 1, len(self.sizes) - 1)
        return (1 - weight_B)[:, None] * seconds_SL[low_B] + weight_B[:, None] * seconds_SL[high_B]

    def observe(self, batch_size: int, length: int, seconds: float, *, is_trial: bool) -> None:
        """Takes in a step. A trial moves its own length, any other step moves all lengths."""
        index = self.lengths.index(length)
        expected = self.seconds(np.array([batch_size]))[0, index]
        change = _RATE * float(np.clip(np.log(seconds / expected), -_LARGEST, _LARGEST))
        (low,), (weight,) = self._place(np.array([batch_size]))
        moved = slice(index, index + 1) if is_trial else slice(None)
        self._log_SL[low, moved] += (1 - weight) * change
        if weight > 0:
            self._log_SL[low + 1, moved] += weight * change

    def _place(self, batch_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the largest measured size up to each batch size, and the part of the way to the next one."""
        sizes = np.minimum(batch_sizes, self.sizes[-1])
        low = np.searchsorted(self.sizes, sizes, side="right") - 1
        high = np.minimum(low + 1, len(self.sizes) - 1)
        width = np.maximum(self.sizes[high] - self.sizes[low], 1)
        return low, (sizes - self.sizes[low]) / width


class Calibration:
    """Measures the steps of one batch size: all lengths in turns, several times up and down.

    A machine whose speed changes from round to round does not disturb the ratios between lengths.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int]):
        self.batch_size, self._lengths = batch_size, list(lengths)
        # Seconds of every steady step so far, a column for each length. A new row begins when all have one.
        self._rounds: list[np.ndarray] = [np.full(len(lengths), np.nan)]
        self._num_steps, self._left = 0, _STEPS_IN_A_ROW
        self._length = self._next()

    @property
    def is_done(self) -> bool:
        return len(self._rounds) > _ROUNDS or self.has_failed

    @property
    def has_failed(self) -> bool:
        """Whether the engine never runs this many requests at a time: for example, its KV cache is too small."""
        return self._num_steps > _PATIENCE * _ROUNDS * _STEPS_IN_A_ROW * len(self._lengths)

    def choose(self) -> int:
        """Length of the next step."""
        if self._left == 0:
            self._length, self._left = self._next(), _STEPS_IN_A_ROW
        self._left -= 1
        self._num_steps += 1
        return self._lengths[self._length]

    def observe(self, step: EngineStep) -> None:
        """Takes in a step. It counts if it has the batch size, and verified and drafted the same length."""
        if step.batch_size == self.batch_size and step.is_steady and not self.is_done:
            self._rounds[-1][self._lengths.index(step.drafted)] = step.seconds
            if not np.isnan(self._rounds[-1]).any():
                self._rounds.append(np.full(len(self._lengths), np.nan))

    def seconds(self) -> np.ndarray:
        """``[L]``: seconds of a step. Ratios are medians over the rounds."""
        log_RL = np.log(np.stack(self._rounds[:_ROUNDS]))
        level_R = log_RL.mean(axis=1, keepdims=True)
        return np.exp(np.median(log_RL - level_R, axis=0) + np.median(level_R))

    def _next(self) -> int:
        """Index of a length that the round lacks: the shortest in every other round, else the longest."""
        lacking = np.flatnonzero(np.isnan(self._rounds[-1]))
        return int(lacking[0 if len(self._rounds) % 2 else -1])
