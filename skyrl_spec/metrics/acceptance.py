"""Acceptance of drafted tokens, from vLLM's counters."""

from __future__ import annotations

from collections.abc import Mapping

from skyrl_spec.metrics import names
from skyrl_spec.types import SpecCounters

# Positions that fewer drafts have get no rate: a schedule tries long drafts now and then, and a handful tells nothing.
_LEAST_SHARE = 0.25


def acceptance_metrics(counters: SpecCounters, prefix: str) -> dict[str, float]:
    """Acceptance metrics under ``prefix``, which is ``"vllm/train"`` or ``"vllm/eval"``. Empty if nothing was drafted.

    - ``draft_acceptance_rate`` = accepted tokens / drafted tokens
    - ``draft_mean_acceptance_length`` = 1 + accepted tokens / drafts
    - ``draft_acceptance_rate_pos_K`` = tokens accepted at draft position K (from 1) / drafts
      of at least K tokens
    """
    if counters.num_drafts == 0:
        return {}
    metrics = {
        "acceptance_rate": counters.num_accepted_tokens / counters.num_draft_tokens,
        "mean_acceptance_length": counters.mean_acceptance_length,
        "num_draft_tokens": float(counters.num_draft_tokens),
        "num_accepted_tokens": float(counters.num_accepted_tokens),
    }
    per_position = zip(counters.num_accepted_tokens_per_pos, counters.drafts_per_pos, strict=True)
    for position, (accepted, drafts) in enumerate(per_position, start=1):
        if drafts >= _LEAST_SHARE * counters.num_drafts:
            metrics[f"acceptance_rate_pos_{position}"] = accepted / drafts
    return {f"{prefix}/draft_{name}": value for name, value in metrics.items()}


def comparable_lengths(values: Mapping[str, float]) -> tuple[float, float] | None:
    """Predicted and measured acceptance length of a training step, over the first draft positions with both rates.

    Engines that choose their drafts' lengths draft shorter ones than the trainer predicts. None: no position has both.
    """
    predicted, measured, position = 1.0, 1.0, 1
    while True:
        more_predicted = values.get(names.predicted_acceptance_pos(position))
        more_measured = values.get(names.acceptance_rate_pos("train", position))
        if more_predicted is None or more_measured is None:
            return (predicted, measured) if position > 1 else None
        predicted, measured, position = predicted + more_predicted, measured + more_measured, position + 1
