"""Allowed values of a setting: a range of numbers, or a choice of words."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    """Allowed numbers, all finite; an open end is excluded."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low:g}"
        high = f"{'below' if self.high_open else 'at most'} {self.high:g}"
        return low if math.isinf(self.high) else f"{low} and {high}"


Choice = tuple[str, ...]
Allowed = Range | Choice | None

POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
FROM_ONE = Range(1)
# At least 0 and below 1.
PROBABILITY = Range(0, 1, high_open=True)
# Above 0 and below 1.
LEVEL = Range(0, 1, low_open=True, high_open=True)
# Above 0 and at most 1.
SHARE = Range(0, 1, low_open=True)
# Seeds of numpy are 32 bits wide.
SEEDS = Range(0, 2**32 - 1)
