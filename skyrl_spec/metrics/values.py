"""Values of metrics from sums and counts, which are added up first and divided once."""

from __future__ import annotations

from skyrl_spec.types import Metric, Metrics


def merge(*parts: Metrics) -> Metrics:
    """Sums and counts of each key, added up over ``parts``. ``parts`` are not changed."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged.setdefault(name, Metric()).add(metric.total, metric.count)
    return merged


def values(metrics: Metrics) -> dict[str, float]:
    """Sum / count of each key. NaN if the count is 0."""
    return {name: metric.value for name, metric in metrics.items()}
