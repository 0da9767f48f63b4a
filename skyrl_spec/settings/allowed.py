"""Allowed values of settings: ranges of numbers and choices of words."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    """A range of finite numbers. An open end is excluded."""

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
        low = f"{'above' if self.low_open else 'at least'} {_number(self.low)}"
        high = f"{'below' if self.high_open else 'at most'} {_number(self.high)}"
        return low if math.isinf(self.high) else f"{low} and {high}"


def _number(value: float) -> str:
    """All digits of an integer."""
    return str(value) if isinstance(value, int) else f"{value:g}"


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
# Of vLLM, and 0: no sleep.
SLEEP_LEVELS = Range(0, 2)
# numpy takes seeds of 32 bits.
SEEDS = Range(0, 2**32 - 1)

DEVICES = ("cpu", "cuda")
ON_FAILURE = ("error", "warn")
RUNNING_REQUESTS = ("recompute", "keep", "wait")
RECOMPUTE = ("selective", "full")
RECOMPUTE_MODULES = ("layernorm", "mlp", "core_attn")
DTYPES = ("fp32", "bf16")
# Distances of a drafted token's distribution from the policy's, and the loss of whole chains that is made of one.
TERM_TYPES = ("soft_ce", "topk_soft_ce", "hard_ce", "tv")
LOSS_TYPES = (*TERM_TYPES, "accept")
POLICY_LOSS_TYPES = ("regular", "gspo", "cispo")
# Where the ratio of probabilities in the policy's loss is anchored.
RATIO_ANCHORS = ("old", "rollout")
ADVANTAGE_ESTIMATORS = ("grpo", "rloo", "reinforce++")
LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")
DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")
LOGGERS = ("console", "wandb", "tensorboard")
SPECULATIVE_METHODS = ("mtp", "dflash", "eagle3", "ngram")
