"""Checks in every step that rollouts come from the trained policy and draft. They need no calls to the engines."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from skyrl_spec.errors import RunError
from skyrl_spec.metrics import names
from skyrl_spec.metrics.acceptance import comparable_lengths
from skyrl_spec.settings.schema import CanaryConfig
from skyrl_spec.types import Rollout, TrainBatch, Versions

# Mean |log-prob difference| of engine and trainer above which a warning is printed, by the coarser dtype of the two.
LOGPROBS_LIMIT = {"fp32": 1e-3, "bf16": 0.1}

# Standard errors of the predicted acceptance length that a gap may have on top of its limit. Drafts of one response
# resemble one another, which makes the variance of a mean larger by this factor.
_NUM_ERRORS, _DESIGN_EFFECT = 3.0, 4.0


def staleness(rollouts: Sequence[Rollout], versions: Versions, allowed: int) -> float:
    """Mean number of training steps by which the trainer is ahead of the weights that sampled a rollout.

    Raises:
        RunError: it is more than ``allowed`` for some, or some come from a newer policy or draft. With ``allowed=0``,
            policy and draft must be those of ``versions``.
    """
    sampled = [rollout.generation.versions for rollout in rollouts]
    stale = {one for one in sampled if not _is_recent(one, versions, allowed)}
    if stale:
        raise RunError(
            f"rollouts were sampled with {', '.join(sorted(map(str, stale)))}, but the trainer is at {versions}: "
            "an engine missed a sync"
        )
    return float(np.mean([versions.policy - one.policy for one in sampled]))


def _is_recent(sampled: Versions, versions: Versions, allowed: int) -> bool:
    if allowed == 0:
        return sampled == versions
    # A step may leave the draft as it is.
    return versions.policy - allowed <= sampled.policy <= versions.policy and sampled.draft <= versions.draft


def span_metrics(rollouts: Sequence[Rollout], *, keeps_keys: bool) -> dict[str, float]:
    """How many weights sampled a response, and acceptance lengths by the updates that a response had seen.

    ``keeps_keys``: responses went on with the keys they had, so that the first step after an update verified drafts.
    """
    counts = np.array([1 + len(rollout.generation.updates) for rollout in rollouts])
    metrics = {names.SPANS: float(counts.mean()), names.SPANNING: float((counts > 1).mean())}
    tokens, steps = np.zeros(counts.max()), np.zeros(counts.max())
    for rollout in rollouts:
        generation = rollout.generation
        # A response of several turns has no number of steps.
        if len(generation.num_steps) != 1 + len(generation.updates):
            continue
        starts = [0, *(index for index, _ in generation.updates), len(generation.token_ids)]
        plain = [1] + [int(not keeps_keys)] * len(generation.updates)
        tokens[: len(plain)] += np.diff(starts) - plain
        steps[: len(plain)] += np.array(generation.num_steps) - plain
    return metrics | {
        names.acceptance_after_updates(count): float(tokens[count] / steps[count])
        for count in range(len(steps))
        if steps[count] > 0
    }


def logprob_agreement(batch: TrainBatch) -> dict[str, float]:
    """Agreement of trainer and engines on the rollouts, before an update: mean and largest |log-prob difference|, KL.

    KL(engine || trainer) is estimated on the engine's samples as ``exp(d) - 1 - d`` with ``d`` the log-prob of the
    trainer minus that of the engine (k3 of "Approximating KL Divergence", Schulman 2020). It is never negative.

    Empty if no token is trained on.
    """
    assert batch.policy_logprobs is not None
    if not batch.loss_mask.any():
        return {}
    difference = (batch.policy_logprobs - batch.rollout_logprobs)[batch.loss_mask].astype(np.float64)
    return {
        names.LOGPROBS_DIFF: float(np.abs(difference).mean()),
        names.LOGPROBS_DIFF_MAX: float(np.abs(difference).max()),
        names.LOGPROBS_KL: float((np.expm1(difference) - difference).mean()),
    }


def acceptance_gap(values: Mapping[str, float]) -> dict[str, float]:
    """Predicted minus measured acceptance length, over the draft positions with both numbers; empty without any."""
    lengths = comparable_lengths(values)
    return {} if lengths is None else {names.ACCEPTANCE_GAP: lengths[0] - lengths[1]}


def _prediction_error(values: Mapping[str, float]) -> float:
    """Standard error of the predicted acceptance length, from the predicted rates and the number of drafts."""
    drafts, rates, position = values.get(names.PREDICTED_DRAFTS, math.inf), [], 1
    while (rate := values.get(names.predicted_acceptance_pos(position))) is not None:
        rates.append(rate)
        position += 1
    mean_square = sum((2 * position - 1) * rate for position, rate in enumerate(rates, start=1))
    variance = max(mean_square - sum(rates) ** 2, 0.0)
    return math.sqrt(_DESIGN_EFFECT * variance / drafts) if drafts else math.inf


class Watch:
    """Prints a warning, once each, when a step's metrics are beyond their limits."""

    def __init__(self, config: CanaryConfig, *, dtype: str, temperature: float, missing_positions: int = 0):
        """``missing_positions``: those that drafts lack behind the longest sequence (``drafts.speculation``)."""
        self._config, self._temperature, self._missing_positions = config, temperature, missing_positions
        limit = config.max_logprobs_diff
        self._logprobs_limit = LOGPROBS_LIMIT[dtype] if limit is None else limit
        self._printed: set[str] = set()

    def look(self, step_values: Mapping[str, float]) -> None:
        difference = step_values.get(names.LOGPROBS_DIFF)
        if difference is not None and not difference <= self._logprobs_limit:
            self._say(
                names.LOGPROBS_DIFF,
                f"{names.LOGPROBS_DIFF} is {difference:.2g}, above {self._logprobs_limit:g} "
                "(trainer.canary.max_logprobs_diff): the engines do not sample from the trained policy; likely causes "
                "are a truncating sampling setting, different temperatures, or a faulty weight transfer",
            )
        gap, measured = step_values.get(names.ACCEPTANCE_GAP), step_values.get(names.acceptance_length("train"))
        if gap is None or measured is None:
            return
        limit = self._config.max_acceptance_gap * measured + _NUM_ERRORS * _prediction_error(step_values)
        if not abs(gap) <= limit:
            causes = (
                "the engines' draft is not the trainer's (see canary/draft_*), or its cached keys are old"
                if gap > 0
                else "the trainer's draft gets other inputs than the engines' (layers, norms), or the engines sample "
                f"at another temperature than {self._temperature:g}"
            )
            if gap > 0 and self._missing_positions:
                causes = (
                    "sequences reach the model's last positions, where nothing is drafted: lower "
                    f"generator.sampling_params.max_generate_length by {self._missing_positions}. Else {causes}"
                )
            self._say(
                names.ACCEPTANCE_GAP,
                f"the trainer predicts an acceptance length of {measured + gap:.2f}, the engines measure "
                f"{measured:.2f} (trainer.canary.max_acceptance_gap={self._config.max_acceptance_gap:g}): "
                f"likely cause: {causes}",
            )

    def _say(self, topic: str, line: str) -> None:
        if topic not in self._printed:
            self._printed.add(topic)
            print(f"skyrl-spec: warning: {line} (printed once)", file=sys.stderr)
