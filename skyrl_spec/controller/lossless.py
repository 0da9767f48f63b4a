"""The losslessness canary: do engines generate the same with the draft and without it?

At temperature 0, tokens are compared one by one. At the sampling temperature, the distributions are compared by
two-sample Kolmogorov-Smirnov tests of response lengths and of log-probs at each of the first positions, with
Bonferroni's correction. The tests are conservative for discrete values.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.errors import RunError
from skyrl_spec.metrics import names
from skyrl_spec.settings.schema import CanaryConfig, SamplingConfig
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.types import Generation, Prompt, Versions

# Number of response positions whose log-probs are tested.
_NUM_POSITIONS = 8


class PlainEngine:
    """An additional engine without a draft."""

    def __init__(self, engines: EngineGroup, policy: PolicyGroup):
        self._engines = engines
        # Ray's object store always serves it: this engine runs on CPU, on the driver's machine.
        self._sync = WeightSync(policy, engines, backend="ray", components=["policy"])

    def updated(self) -> EngineGroup:
        """The engine, with the workers' current policy."""
        self._sync.sync()
        return self._engines

    def shutdown(self) -> None:
        self._engines.shutdown()


class LosslessCanary:
    """Compares the engines, which have a draft, with one that has none."""

    def __init__(
        self,
        config: CanaryConfig,
        sampling: SamplingConfig,
        prompts: Sequence[Prompt],
        plain: PlainEngine,
        *,
        exact: bool,
    ):
        """``exact``: greedy tokens must be equal, as in fp32. In bf16, rounding depends on the size of the batch."""
        self._config, self._sampling, self._prompts, self._exact = config, sampling, list(prompts), exact
        self._plain = plain

    def is_due(self, versions: Versions) -> bool:
        # The larger version, because the policy stays at version 0 in a warm-up.
        return max(versions.policy, versions.draft) % self._config.lossless_interval == 0

    def check(self, drafting: EngineGroup, seed: int) -> dict[str, float]:
        """Metrics: the share of prompts with equal greedy responses, and the smallest corrected p-value.

        Raises:
            RunError: responses differ, and ``on_mismatch`` is "error".
        """
        plain = self._plain.updated()
        greedy = replace(self._sampling, temperature=0.0)
        pairs = zip(*(_flat(e.generate(self._prompts, greedy, 1, seed)) for e in (drafting, plain)), strict=True)
        equal = float(np.mean([mine.token_ids == theirs.token_ids for mine, theirs in pairs]))
        # Different seeds, because the test needs independent samples.
        num_samples = self._config.lossless_num_samples
        p_value = two_sample_p_value(
            _flat(drafting.generate(self._prompts, self._sampling, num_samples, 2 * seed)),
            _flat(plain.generate(self._prompts, self._sampling, num_samples, 2 * seed + 1)),
        )
        if self._exact and equal < 1:
            self._report(f"{1 - equal:.0%} of the greedy responses differ with the draft and without")
        if p_value < self._config.lossless_level:
            self._report(
                f"sampled responses have another distribution with the draft than without: p = {p_value:.1e}, below "
                f"trainer.canary.lossless_level={self._config.lossless_level:g}"
            )
        return {names.LOSSLESS_GREEDY: equal, names.LOSSLESS_P_VALUE: p_value}

    def _report(self, problem: str) -> None:
        line = f"losslessness canary: {problem}"
        if self._config.on_mismatch == "error":
            raise RunError(f"{line} (trainer.canary.on_mismatch=warn continues)")
        print(f"skyrl-spec: warning: {line}", file=sys.stderr)


def two_sample_p_value(first: Sequence[Generation], second: Sequence[Generation]) -> float:
    """Smallest p-value of the tests times their number, at most 1."""
    from scipy.stats import ks_2samp

    samples: list[tuple[Sequence[float], Sequence[float]]] = [
        ([len(g.token_ids) for g in first], [len(g.token_ids) for g in second])
    ]
    for position in range(_NUM_POSITIONS):
        pair = [[g.logprobs[position] for g in group if len(g.logprobs) > position] for group in (first, second)]
        if all(pair):
            samples.append((pair[0], pair[1]))
    return min(1.0, len(samples) * min(float(ks_2samp(*pair).pvalue) for pair in samples))


def _flat(groups: list[list[Generation]]) -> list[Generation]:
    return [generation for group in groups for generation in group]
