"""From sums and counts to values: added up wherever they come from, divided once."""

from __future__ import annotations

from skyrl_spec.types import Metric, Metrics


def merge(*parts: Metrics) -> Metrics:
    """Adds up the sums and the counts of each key over ``parts``, which stay as they are."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged.setdefault(name, Metric()).add(metric.total, metric.count)
    return merged


def values(metrics: Metrics) -> dict[str, float]:
    """Sum / count of each key; NaN where nothing was counted."""
    return {name: metric.value for name, metric in metrics.items()}
