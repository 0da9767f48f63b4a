"""What the training loop measures: seconds of phases, idle shares, reports of the workers, the draft's speed-up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from skyrl_spec.controller.lossless import PlainEngine
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.speculation import missing_positions
from skyrl_spec.metrics import names
from skyrl_spec.metrics.values import merge
from skyrl_spec.metrics.values import values as metric_values
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.types import Prompt, StepReport

if TYPE_CHECKING:
    from skyrl_spec.controller.loop import TrainingLoop


def positions_lacking(config: Config) -> int:
    """Positions that drafts lack behind the longest sequence."""
    kind = trained_kind(config.trainer)
    if kind is None:
        return 0
    count = kind.speculative_config(config.trainer)["num_speculative_tokens"]
    return missing_positions(config, load_spec(config.trainer.policy.model.path).max_position_embeddings, count)


def measure_speedup(trainer: TrainingLoop, plain: PlainEngine, prompts: Sequence[Prompt], rounds: int = 7) -> float:
    """Ratio of rollout tokens/s with the draft to tokens/s without, on the same prompts: the median of ``rounds``."""
    sampling, groups = trainer.config.generator.sampling_params, (trainer.engines, plain.updated())
    ratios = []
    # The first round is a warm-up.
    for seed in range(rounds + 1):
        speeds = []
        for engines in groups:
            start = time.perf_counter()
            generations = engines.generate(list(prompts), sampling, 1, seed)
            speeds.append(sum(len(g.token_ids) for group in generations for g in group) / (time.perf_counter() - start))
        ratios.append(speeds[0] / speeds[1])
    return float(np.median(ratios[1:]))


@contextmanager
def timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[phase] = time.perf_counter() - start


def idle_shares(timings: dict[str, float], sampling_s: float) -> dict[str, float]:
    """Shares of a step in which the workers did not train, and in which the engines did not sample the next batch."""
    train_s = sum(timings.get(phase, 0.0) for phase in ("fwd_logprobs", "policy_train", "draft_train"))
    return {
        names.TRAINER_IDLE: 1 - train_s / timings["step"],
        names.ENGINES_IDLE: max(0.0, 1 - sampling_s / timings["step"]),
    }


def report_values(reports: Sequence[StepReport]) -> dict[str, float]:
    return metric_values(merge(*(report.metrics for report in reports)))


def train_timings(reports: Sequence[StepReport]) -> dict[str, float]:
    timings = {"policy_train": sum(report.policy_train_s for report in reports)}
    draft_s = sum(report.draft_train_s for report in reports)
    return timings | ({"draft_train": draft_s} if draft_s else {})
