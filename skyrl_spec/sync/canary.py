"""The sync canary: after a sync, do trainer and engines compute the same policy and the same draft?

A check asks every engine for short responses to a few fixed prompts, and for the draft's proposals along them. The
trainer computes log-probs of the same tokens under its own policy and draft. The number of a check is the mean
|log-prob difference|, for the policy and for the draft.

Trainer and engine are two implementations, so the number is never 0. Before the first sync, ``num_baselines`` checks
with different seeds measure this noise. Later numbers beyond it mean other weights, or a fault in what is computed from
them: a lost chunk, a stale buffer or cache, other layers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from skyrl_spec.errors import RunError, SyncMismatchError
from skyrl_spec.metrics import names
from skyrl_spec.settings.schema import CanaryConfig, SamplingConfig
from skyrl_spec.types import Component, Proposals, ProposalScores, Versions

# Largest allowed number of a check, by the coarser dtype of trainer and engine: for the loaded engine, and the least
# limit after a sync.
LOADED_LIMIT = {"fp32": 1e-4, "bf16": 0.2}
_SYNCED_FLOOR = {"fp32": 2e-5, "bf16": 0.02}
# vLLM prefills at most this many tokens in a step by default. It drafts again after each part of a longer prompt.
_LONGEST_PROMPT = 1024
_COMPONENTS: tuple[Component, Component] = ("policy", "draft")


@dataclass(frozen=True)
class Agreement:
    """Mean |log-prob of the engine - log-prob of the trainer| over sampled tokens (policy) and drafted ones (draft).

    ``favourites`` is the share of drafted tokens that the trainer's draft drafts too. None without a draft.
    """

    policy: float
    draft: float | None = None
    favourites: float | None = None

    def of(self, component: Component) -> float | None:
        return self.policy if component == "policy" else self.draft


def compare(proposals: Sequence[Proposals], scores: ProposalScores) -> Agreement:
    """Agreement of an engine's proposals with the trainer's scores of them."""
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


def noise_limit(baselines: Sequence[float], floor: float) -> float:
    """Largest number of a later check that counts as noise: ``max(floor, 2 * mean + 6 * max(spread, mean / 3))``.

    ``mean`` and ``spread`` (sample standard deviation) are those of the baselines. Twice the mean, because training
    changes the weights, and rounding errors with them. Six spreads, because a number is a mean over a few dozen tokens
    with rare large differences, and three baselines often underestimate their spread. The spread counts as at least a
    third of the mean: a few baselines can be equal by chance, and one alone has no spread. A limit is thus never below
    four times the mean.
    """
    mean = float(np.mean(baselines))
    spread = float(np.std(baselines, ddof=1)) if len(baselines) > 1 else 0.0
    return max(floor, 2 * mean + 6 * max(spread, mean / 3))


class Engines(Protocol):
    def propose(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[list[Proposals]]:
        """Each engine's proposals for the same prompts."""
        ...


class Policy(Protocol):
    def score_all(self, answers: Sequence[list[Proposals]]) -> list[ProposalScores]:
        """The trainer's scores of each answer."""
        ...


class SyncCanary:
    """Holds the fixed prompts, the baselines, and the versions at which trainer and engines agreed last.

    ``check`` never raises for a mismatch, so that the training step can be completed. ``require_agreement`` does.
    """

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
        # No truncation: the trainer's log-probs are those of the whole distribution.
        self._sampling = SamplingConfig(max_generate_length=config.num_tokens, temperature=temperature)
        self._baselines: list[Agreement] = []
        self._last_good: Versions | None = None
        self._mismatch: str | None = None
        self._printed: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {
            "baselines": [asdict(baseline) for baseline in self._baselines],
            "last_good": None if self._last_good is None else asdict(self._last_good),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads ``state_dict``, or the one of older checkpoints, which has a single ``baseline``."""
        baselines = state["baselines"] if "baselines" in state else [state["baseline"]]
        self._baselines = [Agreement(**baseline) for baseline in baselines if baseline is not None]
        self._last_good = None if state["last_good"] is None else Versions(**state["last_good"])

    def is_due(self, versions: Versions) -> bool:
        """Whether to check at ``versions``: after the first sync, and every ``interval`` syncs from there."""
        return self._config.enabled and (max(versions.policy, versions.draft) - 1) % self._config.interval == 0

    def check(self, versions: Versions) -> dict[str, float]:
        """Compares every engine with the trainer; returns the metrics of the worst engine.

        The first check of a run measures the noise. After a sync, a number beyond the limit is measured again under
        ``num_baselines`` other seeds, and is a mismatch if most of them exceed the limit too. NaN is a mismatch
        at once, and so is an engine that states other versions than ``versions``.
        """
        answers = self._engines.propose(self._prompts, self._sampling, seed=0)
        first = self._compare(answers)
        problems = _stale(answers, versions)
        if not problems:
            problems = self._synced(first, versions) if self._baselines else self._loaded(first, versions)
        if problems:
            self._report(problems)
        else:
            self._last_good, self._mismatch = versions, None
        return _metrics(_worst(first))

    def require_agreement(self) -> None:
        """Raises the mismatch of the last check, if there is one and ``on_mismatch`` is "error".

        Raises:
            RunError: trainer and engines have never agreed: a restart would not help.
            SyncMismatchError: they agreed before.
        """
        mismatch, self._mismatch = self._mismatch, None
        if mismatch is None:
            return
        raise (RunError if self._last_good is None else SyncMismatchError)(mismatch)

    def _compare(self, answers: Sequence[list[Proposals]]) -> list[Agreement]:
        return [compare(*pair) for pair in zip(answers, self._policy.score_all(answers), strict=True)]

    def _measure(self, seeds: range) -> list[list[Agreement]]:
        """One check for each seed: the agreement of every engine."""
        return [self._compare(self._engines.propose(self._prompts, self._sampling, seed=seed)) for seed in seeds]

    def _loaded(self, first: list[Agreement], versions: Versions) -> list[str]:
        """Measures the noise; returns the mismatches of engines as they were loaded."""
        checks = [first, *self._measure(range(1, self._config.num_baselines))]
        problems = list(self._problems(checks, versions))
        if not problems:
            self._baselines = [_worst(check) for check in checks]
        return problems

    def _synced(self, first: list[Agreement], versions: Versions) -> list[str]:
        """Mismatches after a sync. Numbers beyond the limit that do not repeat are printed once, and are none."""
        suspected = list(self._problems([first], versions))
        if not suspected or not all(_is_finite(agreement) for agreement in first):
            return suspected
        confirmed = list(self._problems(self._measure(range(1, 1 + self._config.num_baselines)), versions))
        if not confirmed:
            self._warn("noise", f"{'; '.join(suspected)}; not confirmed under other seeds, so it counts as noise")
        return confirmed

    def _problems(self, checks: Sequence[list[Agreement]], versions: Versions) -> Iterator[str]:
        """A line for each engine and component that most of ``checks`` find beyond the limit, or one finds NaN."""
        for index, agreements in enumerate(zip(*checks, strict=True)):
            for component in _COMPONENTS:
                values = [value for agreement in agreements if (value := agreement.of(component)) is not None]
                limit = self._limit(component)
                # Not "greater": NaN exceeds every limit.
                num_beyond = sum(not value <= limit for value in values)
                if 2 * num_beyond > len(values) or not all(map(math.isfinite, values)):
                    yield self._line(index, component, agreements, num_beyond, versions)

    def _line(
        self, index: int, component: Component, agreements: Sequence[Agreement], num_beyond: int, versions: Versions
    ) -> str:
        limit, count = self._limit(component), f" in {num_beyond} of {len(agreements)} checks"
        before = ", ".join(f"{value:.1e}" for item in self._baselines if (value := item.of(component)) is not None)
        shares = [item.favourites for item in agreements if item.favourites is not None]
        equal = f"; {np.median(shares):.0%} of the drafted tokens are equal" if component == "draft" and shares else ""
        since = "they never agreed" if self._last_good is None else f"they agreed last at {self._last_good}"
        return (
            f"the {component} of engine {index} is not the trainer's at {versions}: mean |log-prob difference| "
            f"{np.median([item.of(component) for item in agreements]):.1e}, above the limit {limit:.1e}{count}"
            + (f" ({before} before the first sync)" if before else "")
            + f"{equal}; {since}"
        )

    def _limit(self, component: Component) -> float:
        baselines = [value for item in self._baselines if (value := item.of(component)) is not None]
        return noise_limit(baselines, _SYNCED_FLOOR[self._dtype]) if baselines else LOADED_LIMIT[self._dtype]

    def _report(self, problems: list[str]) -> None:
        line = "; ".join(problems)
        if self._config.on_mismatch == "error":
            self._mismatch = (
                f"sync canary: {line}; responses would come from other weights than are trained "
                "(trainer.canary.on_mismatch=warn continues)"
            )
        else:
            self._warn("mismatch", line)

    def _warn(self, topic: str, line: str) -> None:
        if topic not in self._printed:
            self._printed.add(topic)
            print(f"skyrl-spec: warning: sync canary: {line} (printed once; see canary/*)", file=sys.stderr)


def fixed_prompts(prompts: Sequence[list[int]], num_prompts: int, max_length: int) -> list[list[int]]:
    """``num_prompts`` prompts spread over a dataset, the last extended by other prompts up to ``max_length`` tokens.

    The prefix cache keeps the long one: an engine whose cache outlived a sync answers it with old keys.
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


def _stale(answers: Sequence[Sequence[Proposals]], versions: Versions) -> list[str]:
    """A line for each engine that states other versions than ``versions``."""
    lines = []
    for index, answer in enumerate(answers):
        stated = {item.generation.versions for item in answer}
        if stated != {versions}:
            lines.append(f"engine {index} says that it holds {', '.join(sorted(map(str, stated)))}, not {versions}")
    return lines


def _is_finite(agreement: Agreement) -> bool:
    return math.isfinite(agreement.policy) and (agreement.draft is None or math.isfinite(agreement.draft))


def _worst(agreements: Sequence[Agreement]) -> Agreement:
    """The largest difference of each component over the engines; NaN if one has it."""
    policy = float(np.max([agreement.policy for agreement in agreements]))
    drafts = [agreement.draft for agreement in agreements if agreement.draft is not None]
    shares = [agreement.favourites for agreement in agreements if agreement.favourites is not None]
    if not drafts:
        return Agreement(policy)
    return Agreement(policy, float(np.max(drafts)), min(shares))


def _metrics(agreement: Agreement) -> dict[str, float]:
    metrics = {names.CANARY_POLICY: agreement.policy}
    if agreement.draft is not None and agreement.favourites is not None:
        metrics |= {names.CANARY_DRAFT: agreement.draft, names.CANARY_FAVOURITES: agreement.favourites}
    return metrics
