"""The most important values of a run: reward, draft acceptance length and speed, at its start and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from skyrl_spec.metrics import names
from skyrl_spec.types import FROZEN


class Headline(NamedTuple):
    """A metric whose first and last values are compared. ``slug`` is its name in ``summary.json``."""

    slug: str
    title: str
    key: str
    decimals: int


HEADLINES = (
    Headline("eval_reward", "reward on held-out prompts", names.EVAL_SCORE, 3),
    Headline("train_reward", "reward in training", names.AVG_RAW_REWARD, 3),
    Headline("eval_acceptance_length", "acceptance length on held-out prompts", names.acceptance_length("eval"), 2),
    Headline("train_acceptance_length", "acceptance length in training", names.acceptance_length("train"), 2),
    Headline("predicted_acceptance_length", "predicted acceptance length", names.PREDICTED_ACCEPTANCE_LENGTH, 2),
    Headline("frozen_acceptance_length", "the same, draft never trained", names.scored_acceptance_length(FROZEN), 2),
    Headline("rollout_tok_s", "rollout tokens/s", names.THROUGHPUT, 0),
)


def first_and_last(records: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """First and last value of ``key`` in the records of ``metrics.jsonl``. None if no record has it."""
    values = [value for record in records if (value := record.get(key)) is not None]
    return (values[0], values[-1]) if values else None


def headline(records: Sequence[Mapping[str, Any]], speedup: float | None = None) -> dict[str, float]:
    """``headline/*`` of a finished run, for ``summary.json`` and the summary in wandb.

    ``speedup``: rollout tokens/s with the draft / tokens/s without it. None: not measured.
    """
    values: dict[str, float] = {"headline/steps": max((record[names.STEP] for record in records), default=0)}
    for entry in HEADLINES:
        if (pair := first_and_last(records, entry.key)) is not None:
            values |= {f"headline/{entry.slug}_first": pair[0], f"headline/{entry.slug}_last": pair[1]}
    step_times = [record[names.STEP_TIME] for record in records if names.STEP_TIME in record]
    if step_times:
        values["headline/mean_step_s"] = sum(step_times) / len(step_times)
    return values if speedup is None else values | {"headline/rollout_speedup": speedup}
