"""The sync canary: after a sync, do trainer and engines compute the same policy and the same draft?

On a few fixed prompts an engine samples short responses and tells what its draft proposed along them. The trainer
computes the log-probs of the same tokens under its own policy and draft. How far the two are apart while an engine
still holds the weights it loaded from disk is what their arithmetic differs by, the baseline; a later difference beyond
that is one of weights, or of what is computed from them: a chunk that was lost, a stale buffer or cache, other layers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from skyrl_spec.errors import RunError
from skyrl_spec.metrics import names
from skyrl_spec.settings.schema import CanaryConfig, SamplingConfig
from skyrl_spec.types import Component, Proposals, ProposalScores, Versions

# Mean |difference| of log-probs that trainer and engine may have: while the engine is as it was loaded, and later on
# if the baseline was better than that. By the coarser dtype of the two.
_LOADED_LIMIT = {"fp32": 1e-4, "bf16": 0.2}
_SYNCED_FLOOR = {"fp32": 2e-5, "bf16": 0.02}
# Tokens that every vLLM prefills in one step by default: behind each part of a prompt it drafts once more.
_LONGEST_PROMPT = 1024
# Other weights, other rounding.
_BASELINE_FACTOR = 4.0


@dataclass(frozen=True)
class Agreement:
    """Mean |log-prob of the engine - of the trainer|, of sampled tokens (policy) and of drafted ones (draft).

    ``favourites`` is the share of drafted tokens that the trainer's draft drafts too. None without a draft.
    """

    policy: float
    draft: float | None = None
    favourites: float | None = None

    def of(self, component: Component) -> float | None:
        return self.policy if component == "policy" else self.draft


def compare(proposals: Sequence[Proposals], scores: ProposalScores) -> Agreement:
    """An engine's side and the trainer's."""
    sampled = np.concatenate([item.generation.logprobs for item in proposals])
    policy = float(np.abs(sampled - scores.policy_logprobs).mean())
    num_scored = scores.favourites.shape[1]
    blocks = [block for item in proposals for block in item.drafted]
    if not blocks or num_scored == 0:
        return Agreement(policy)
    drafted = np.array(blocks)[:, :num_scored]
    logprobs = np.array([block for item in proposals for block in item.draft_logprobs])[:, :num_scored]
    return Agreement(
        policy,
        draft=float(np.abs(logprobs - scores.draft_logprobs).mean()),
        favourites=float((drafted == scores.favourites).mean()),
    )


class Engines(Protocol):
    def propose(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[list[Proposals]]:
        """What each engine answers to the same prompts."""
        ...


class Policy(Protocol):
    def score_proposals(self, proposals: list[Proposals]) -> ProposalScores: ...


class SyncCanary:
    """Holds the fixed prompts, the baseline, and which versions agreed last."""

    def __init__(
        self,
        config: CanaryConfig,
        engines: Engines,
        policy: Policy,
        prompts: list[list[int]],
        *,
        temperature: float,
        dtype: str,
    ):
        self._config, self._engines, self._policy, self._prompts, self._dtype = config, engines, policy, prompts, dtype
        # The whole distribution, which is what the trainer's log-probs are of.
        self._sampling = SamplingConfig(max_generate_length=config.num_tokens, temperature=temperature)
        self._baseline: Agreement | None = None
        self._last_good: Versions | None = None
        self._has_warned = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "baseline": None if self._baseline is None else asdict(self._baseline),
            "last_good": None if self._last_good is None else asdict(self._last_good),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._baseline = None if state["baseline"] is None else Agreement(**state["baseline"])
        self._last_good = None if state["last_good"] is None else Versions(**state["last_good"])

    def is_due(self, versions: Versions) -> bool:
        """After the first sync, and every ``interval`` of them from there."""
        return self._config.enabled and (max(versions.policy, versions.draft) - 1) % self._config.interval == 0

    def check(self, versions: Versions) -> dict[str, float]:
        """Compare every engine with the trainer; returns the metrics of the worst.

        The first check of a run is the baseline.

        Raises:
            RunError: they differ, and ``on_mismatch`` is "error".
        """
        answers = self._engines.propose(self._prompts, self._sampling, seed=0)
        found = [compare(answer, self._policy.score_proposals(answer)) for answer in answers]
        problems = [
            line
            for index, (answer, agreement) in enumerate(zip(answers, found, strict=True))
            for line in self._problems(index, answer, agreement, versions)
        ]
        if problems:
            self._report(problems)
        else:
            self._last_good = versions
            if self._baseline is None:
                self._baseline = _worst(found)
        return _metrics(_worst(found))

    def _problems(self, index: int, answer: Sequence[Proposals], agreement: Agreement, versions: Versions) -> list[str]:
        held = {item.generation.versions for item in answer}
        if held != {versions}:
            stated = ", ".join(sorted(map(str, held)))
            return [f"engine {index} says that it holds {stated}, but was given {versions}"]
        components: tuple[Component, Component] = ("policy", "draft")
        return [line for component in components if (line := self._difference(index, component, agreement, versions))]

    def _difference(self, index: int, component: Component, agreement: Agreement, versions: Versions) -> str | None:
        value, limit = agreement.of(component), self._limit(component)
        # Not "greater": a NaN is a difference.
        if value is None or value <= limit:
            return None
        tokens = (
            "" if component == "policy" else f", {agreement.favourites:.0%} of its drafted tokens are the trainer's"
        )
        since = "they never agreed" if self._last_good is None else f"they agreed at {self._last_good} last"
        loaded = self._baseline.of(component) if self._baseline is not None else None
        baseline = "" if loaded is None else f", {loaded:.1e} when it was loaded"
        return (
            f"at {versions} the {component} of engine {index} is not the trainer's: mean |log-prob difference| "
            f"{value:.1e} ({limit:.1e} allowed{baseline}){tokens}; {since}"
        )

    def _limit(self, component: Component) -> float:
        baseline = None if self._baseline is None else self._baseline.of(component)
        if baseline is None:
            return _LOADED_LIMIT[self._dtype]
        return max(_SYNCED_FLOOR[self._dtype], _BASELINE_FACTOR * baseline)

    def _report(self, problems: list[str]) -> None:
        line = f"sync canary: {'; '.join(problems)}"
        if self._config.on_mismatch == "error":
            raise RunError(f"{line}; the run would train on what it did not sample (trainer.canary.on_mismatch=warn)")
        if not self._has_warned:
            self._has_warned = True
            print(f"skyrl-spec: warning: {line} (said once; canary/* has the rest)", file=sys.stderr)


def fixed_prompts(prompts: Sequence[list[int]], num_prompts: int, max_length: int) -> list[list[int]]:
    """``num_prompts`` prompts spread over a dataset, the last followed by as many others as fit in ``max_length``.

    The long one is what a prefix cache keeps: an engine whose cache outlived a sync answers it with old keys.
    """
    max_length = min(max_length, _LONGEST_PROMPT)
    stride = max(1, len(prompts) // num_prompts)
    chosen = [prompt[:max_length] for prompt in prompts[::stride][:num_prompts]]
    long = chosen[-1]
    for prompt in prompts:
        if len(long) >= max_length:
            break
        long = long + prompt
    return [*chosen[:-1], long[:max_length]]


def _worst(found: Sequence[Agreement]) -> Agreement:
    drafts = [(agreement.draft, agreement.favourites) for agreement in found if agreement.draft is not None]
    policy = float(np.max([agreement.policy for agreement in found]))
    if not drafts:
        return Agreement(policy)
    return Agreement(policy, float(np.max([draft for draft, _ in drafts])), min(share for _, share in drafts))  # type: ignore[type-var]


def _metrics(agreement: Agreement) -> dict[str, float]:
    metrics = {names.CANARY_POLICY: agreement.policy}
    if agreement.draft is not None and agreement.favourites is not None:
        metrics |= {names.CANARY_DRAFT: agreement.draft, names.CANARY_FAVOURITES: agreement.favourites}
    return metrics
