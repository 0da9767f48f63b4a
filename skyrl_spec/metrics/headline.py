"""What one wants to know of a run first: where it began, where it ended, what the draft gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from skyrl_spec.metrics import names


class Headline(NamedTuple):
    """A value that is compared between the first and the last step that has it; ``slug`` names it in a summary."""

    slug: str
    title: str
    key: str
    decimals: int


HEADLINES = (
    Headline("eval_reward", "reward on held-out prompts", names.EVAL_SCORE, 3),
    Headline("train_reward", "reward in training", names.AVG_RAW_REWARD, 3),
    Headline("eval_acceptance_length", "acceptance length on held-out prompts", names.acceptance_length("eval"), 2),
    Headline("train_acceptance_length", "acceptance length in training", names.acceptance_length("train"), 2),
    Headline("rollout_tok_s", "rollout tokens/s", names.THROUGHPUT, 0),
)


def first_and_last(records: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """Of the records of ``metrics.jsonl`` that have the key; None where none has."""
    found = [value for record in records if (value := record.get(key)) is not None]
    return (found[0], found[-1]) if found else None


def headline(records: Sequence[Mapping[str, Any]], speedup: float | None = None) -> dict[str, float]:
    """``headline/*`` of a run that is over: ``summary.json``, and the summary of its wandb run.

    ``speedup``: rollout tokens/s with the draft over tokens/s without, where it was measured.
    """
    values: dict[str, float] = {"headline/steps": max((record[names.STEP] for record in records), default=0)}
    for entry in HEADLINES:
        if (pair := first_and_last(records, entry.key)) is not None:
            values |= {f"headline/{entry.slug}_first": pair[0], f"headline/{entry.slug}_last": pair[1]}
    step_times = [record[names.STEP_TIME] for record in records if names.STEP_TIME in record]
    if step_times:
        values["headline/mean_step_s"] = sum(step_times) / len(step_times)
    return values if speedup is None else values | {"headline/rollout_speedup": speedup}
