"""What each step tells of whether rollouts are what is trained on, without asking the engines anything more."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from skyrl_spec.errors import RunError
from skyrl_spec.metrics import names
from skyrl_spec.settings.schema import CanaryConfig, Config
from skyrl_spec.types import Rollout, TrainBatch, Versions

# Mean |difference| of rollout and trainer log-probs that passes without a word, by the coarser dtype of the two.
LOGPROBS_LIMIT = {"fp32": 1e-3, "bf16": 0.1}


def coarser_dtype(config: Config) -> str:
    """ "bf16" if trainer or engines compute in it."""
    trainer = config.trainer.policy.megatron_config.dtype
    engine = config.generator.inference_engine.dtype or trainer
    return "bf16" if "bf16" in (trainer, engine) else "fp32"


def require_current(rollouts: Sequence[Rollout], versions: Versions) -> None:
    """Rollouts were sampled under the weights that their log-probs are about to be taken under.

    Raises:
        RunError: some were not.
    """
    stale = {rollout.generation.versions for rollout in rollouts} - {versions}
    if stale:
        raise RunError(
            f"rollouts were sampled under {', '.join(sorted(map(str, stale)))}, but the trainer is at {versions}: "
            "an engine missed a sync"
        )


def logprob_agreement(batch: TrainBatch) -> dict[str, float]:
    """Trainer's log-probs of the rollouts, before an update, against the engines': mean and largest |difference|, KL.

    KL(engine || trainer) is estimated on what the engine sampled, as ``exp(d) - 1 - d`` (k3, "Approximating KL
    Divergence", Schulman 2020), which is never negative.
    """
    assert batch.policy_logprobs is not None
    difference = (batch.policy_logprobs - batch.rollout_logprobs)[batch.loss_mask].astype(np.float64)
    return {
        names.LOGPROBS_DIFF: float(np.abs(difference).mean()),
        names.LOGPROBS_DIFF_MAX: float(np.abs(difference).max()),
        names.LOGPROBS_KL: float((np.expm1(difference) - difference).mean()),
    }


def acceptance_gap(values: Mapping[str, float]) -> dict[str, float]:
    """Predicted less measured acceptance length, over the drafted positions that a step has both of."""
    gaps, position = [], 1
    while (predicted := values.get(names.predicted_acceptance_pos(position))) is not None:
        measured = values.get(names.acceptance_rate_pos("train", position))
        if measured is None:
            break
        gaps.append(predicted - measured)
        position += 1
    return {names.ACCEPTANCE_GAP: sum(gaps)} if gaps else {}


class Watch:
    """Says once when a step's numbers are beyond what they should be."""

    def __init__(self, config: CanaryConfig, *, dtype: str, temperature: float):
        self._config, self._temperature = config, temperature
        limit = config.max_logprobs_diff
        self._logprobs_limit = LOGPROBS_LIMIT[dtype] if limit is None else limit
        self._said: set[str] = set()

    def look(self, step_values: Mapping[str, float]) -> None:
        difference = step_values.get(names.LOGPROBS_DIFF)
        if difference is not None and not difference <= self._logprobs_limit:
            self._say(
                names.LOGPROBS_DIFF,
                f"{names.LOGPROBS_DIFF} is {difference:.2g}, above {self._logprobs_limit:g} "
                "(trainer.canary.max_logprobs_diff): engines sample from another distribution than is trained; likely "
                "a truncating sampling setting, a temperature that only one side has, or a weight transfer gone wrong",
            )
        gap, measured = step_values.get(names.ACCEPTANCE_GAP), step_values.get(names.acceptance_length("train"))
        if gap is None or measured is None:
            return
        if not abs(gap) <= self._config.max_acceptance_gap * measured:
            causes = (
                "the engines' draft is not the trainer's (see canary/draft_*), or its keys are of old weights"
                if gap > 0
                else f"the trainer's draft sees other inputs than the engines' (layers, norms), or another temperature "
                f"than {self._temperature:g} is sampled with"
            )
            self._say(
                names.ACCEPTANCE_GAP,
                f"the trainer predicts an acceptance length of {measured + gap:.2f}, the engines measure "
                f"{measured:.2f} (trainer.canary.max_acceptance_gap={self._config.max_acceptance_gap:g}): "
                f"likely {causes}",
            )

    def _say(self, topic: str, line: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            print(f"skyrl-spec: warning: {line} (said once)", file=sys.stderr)
