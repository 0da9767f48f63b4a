"""Means over seeds with 95 % confidence intervals (Student's t)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the ends of its interval, which are nan for a single value."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Interval of the mean of independent ``values``."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Geometric mean of the ratios of pairs, and its interval. Values are positive."""
    logs = [math.log(value / other) for value, other in zip(values, others, strict=True)]
    return Interval(*(math.exp(end) for end in mean_interval(logs)))
