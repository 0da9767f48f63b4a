"""The share of a mini-batch's positions that a draft is trained on in a step, drawn anew in every step.

All positions are equally likely. Every rank draws the same from the whole mini-batch, so a choice depends neither on
packs nor on the number of ranks.

Numpy only, on the host. Shapes: B rows of the mini-batch, S tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Chains are followed through a window, so it must be longer than a few of them.
SMALLEST_WINDOW = 32


class StepRandom:
    """A generator for each step. Its state is the number of steps."""

    def __init__(self, seed: int):
        self._seed, self.num_steps = seed, 0

    def next_step(self) -> np.random.Generator:
        """The generator of the next step."""
        self.num_steps += 1
        return np.random.default_rng((self._seed, self.num_steps))

    def seed_of(self, row: int) -> tuple[int, int, int]:
        """Seed of what is drawn for one row in this step."""
        return self._seed, self.num_steps, row

    def chances(self, rows: Sequence[int], lengths: Sequence[int], num: int) -> np.ndarray:
        """Numbers from 0 to 1 for the tokens of rows with these lengths, end to end: float32 ``[num, T]``."""
        # Token by token, so that a row that is lengthened keeps its numbers.
        parts = [
            np.random.default_rng((*self.seed_of(row), 1)).random((length, num), np.float32)
            for row, length in zip(rows, lengths, strict=True)
        ]
        return np.ascontiguousarray(np.concatenate(parts).T)


@dataclass(frozen=True)
class Windows:
    """Consecutive candidates of each row. Positions in the row; nothing is drawn where ``end == begin``."""

    begin_B: np.ndarray
    end_B: np.ndarray
    # First candidate that counts in an average over chains (``draw_windows``).
    counted_B: np.ndarray


def draw_windows(is_candidate_BS: np.ndarray, share: float, num_ignored: int, rng: np.random.Generator) -> Windows:
    """A window of candidates in some rows. It holds each candidate with probability ``share``.

    The window of a row with n candidates begins at a random one of them, or before the first, and is cut at both ends
    of the row. It is as long as it must be to hold ``share`` of them, and at least ``SMALLEST_WINDOW``.

    Args:
        share: above 0. At 1 every window holds all candidates.
        num_ignored: length of the part of a window, cut or not, that does not count. Whoever follows chains through a
            window does not know where they would begin there.
    """
    row_N, position_N = np.nonzero(is_candidate_BS)
    num_B = np.bincount(row_N, minlength=len(is_candidate_BS))
    if share >= 1:
        first_B, last_B, counted_B = np.zeros_like(num_B), num_B, np.zeros_like(num_B)
    else:
        width_B, probability_B = _widths(num_B, share)
        is_drawn_B = systematic_round(probability_B, rng) > 0
        begin_B = rng.integers(1 - width_B, np.maximum(num_B, 1))
        first_B = np.maximum(begin_B, 0)
        last_B = np.where(is_drawn_B, np.minimum(begin_B + width_B, num_B), first_B)
        counted_B = np.maximum(begin_B + num_ignored, 0)
    # A number behind the last candidate stands for the position behind it.
    ends_B = np.cumsum(num_B)
    table = np.append(position_N, 0)

    def position(number_B: np.ndarray) -> np.ndarray:
        inside_B = np.minimum(number_B, num_B - 1)
        return np.where(num_B > 0, table[ends_B - num_B + np.maximum(inside_B, 0)] + (number_B > inside_B), 0)

    return Windows(
        position(first_B), np.where(last_B > first_B, position(last_B - 1) + 1, position(first_B)), position(counted_B)
    )


def _widths(num_B: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the windows of rows with ``num_B`` candidates, and the probabilities that they are drawn."""
    width_B = np.maximum(np.ceil(share * (num_B - 1) / (1 - share)), SMALLEST_WINDOW).astype(int)
    return width_B, np.where(num_B > 0, share * (num_B + width_B - 1) / width_B, 0.0)


def mean_window(num: int, share: float) -> tuple[float, float, float]:
    """Probability of a window in a row with ``num`` candidates, its mean first candidate, and its mean end."""
    if share >= 1:
        return 1.0, 0.0, float(num)
    (width,), (probability,) = _widths(np.array([num]), share)
    begin_N = np.arange(1 - width, num)
    return float(probability), np.maximum(begin_N, 0).mean(), np.minimum(begin_N + width, num).mean()


def draw_numbers(num_B: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """How many of each row's ``num_B`` candidates are drawn: ``share`` of them in the mean, int64 ``[B]``."""
    return num_B if share >= 1 else systematic_round(share * num_B, rng)


def mean_number(num: int, share: float) -> tuple[float, float]:
    """Probability that any of ``num`` candidates of a row are drawn, and their mean number if so."""
    probability = min(1.0, share * num)
    return probability, share * num / probability if probability else 0.0


def systematic_round(expected_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random integers with these means, int64. Each is its mean rounded down or up; so is the sum of any first ones.

    Means with a sum below 1 are scaled up to 1, so that one of the integers is not 0.
    """
    total = expected_B.sum()
    bounds_B = np.cumsum(expected_B / min(total, 1.0) if total > 0 else expected_B) + rng.random()
    return np.diff(np.floor(bounds_B), prepend=0.0).astype(np.int64)
