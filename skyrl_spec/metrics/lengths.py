"""Metrics of a schedule that chooses how many tokens to draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skyrl_spec.metrics import names
from skyrl_spec.types import LengthLog


def length_metrics(logs: Sequence[LengthLog]) -> dict[str, float]:
    """Metrics of all engines' steps. Empty without steps, or without a schedule.

    Tokens per second are those of an engine, in decode steps only.
    """
    if not logs:
        return {}
    steps_SL = np.sum([log.steps for log in logs], axis=0)
    if not steps_SL.any():
        return {}
    lengths_L = np.maximum(np.arange(-1, steps_SL.shape[1] - 1), 0)
    steps_S = steps_SL.sum(axis=1)
    metrics = {
        names.length_at_batch(2**index): float(steps_SL[index] @ lengths_L / steps_S[index])
        for index in np.flatnonzero(steps_S)
    }
    metrics[names.DRAFTER_OFF] = float(steps_SL[:, 0].sum() / steps_S.sum())
    seconds, tokens, expected, plain = (
        float(np.sum([getattr(log, name) for log in logs]))
        for name in ("seconds", "tokens", "expected_tokens", "plain_tokens")
    )
    if seconds > 0:
        metrics[names.DECODE_THROUGHPUT] = tokens / seconds
        if np.isfinite(expected):
            metrics |= {names.EXPECTED_THROUGHPUT: expected / seconds, names.ESTIMATED_SPEEDUP: tokens / plain}
    return metrics
