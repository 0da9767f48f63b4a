"""Checks with real engines and workers: the same functions that a run's canaries use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from skyrl_spec.controller.run import Running
from skyrl_spec.controller.task import Task
from skyrl_spec.doctor.exactness import NUM_RESPONSES, chi_square, sliced_sampling
from skyrl_spec.doctor.finding import FAIL, OK, Finding, look, skipped
from skyrl_spec.doctor.reference import is_small, reference_logprobs
from skyrl_spec.doctor.reload import Exported
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.metrics import names
from skyrl_spec.settings.derived import coarser_dtype, max_input_length
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.specs.files import read_config, require_tensors
from skyrl_spec.specs.model import parse_spec, tensor_shapes
from skyrl_spec.sync.canary import LOADED_LIMIT
from skyrl_spec.types import Prompt, Proposals, ProposalScores

_NUM_FROZEN_SYNCS, _SEED = 10, 0


class Patient:
    """Running engines and workers, and what the checks ask them."""

    def __init__(self, running: Running, task: Task):
        self.running, self.task, self.trainer = running, task, running.trainer
        self.has_draft = "draft" in self.trainer.sync.components
        self.temperature = task.config.generator.sampling_params.temperature
        self.limit = LOADED_LIMIT[coarser_dtype(task.config)]
        # Set by the last check.
        self.exported: Exported | None = None

    def findings(self, *, thorough: bool = False) -> Iterator[Finding]:
        """All checks, one after the other. Training comes last, because it changes the weights."""
        proposals, scores = self.proposed()
        yield self.canary("engine as loaded")
        if self.has_draft:
            yield depths(proposals, scores, self.limit)
        yield self.transformers("policy", Path(self.task.config.trainer.policy.model.path), proposals, scores)
        yield self.losslessness()
        if thorough:
            yield self.exact_sampling()
        yield self.prefix_cache()
        yield self.last_position()
        moved = self.step()
        yield moved
        if moved.state == FAIL:
            return
        yield self.canary("engine after a sync")
        if self.has_draft:
            # Of the policy alone. The draft's weights must not change with them.
            for _ in range(_NUM_FROZEN_SYNCS):
                with self.trainer.shifts.sync():
                    self.trainer.sync.sync(draft=False)
            yield self.canary(f"after {_NUM_FROZEN_SYNCS} more syncs")
        yield self.export()

    def proposed(self) -> tuple[list[Proposals], ProposalScores]:
        """Short responses of one engine with its draft's proposals, and the trainer's scores of them."""
        prompts = [prompt.token_ids for prompt in self.task.stream.prompts[:4]]
        proposals = self.running.engines.propose_on_one(prompts, self._short_sampling(), seed=_SEED)
        return proposals, self.trainer.scorers.score_all([proposals])[0]

    def canary(self, check: str) -> Finding:
        """The sync canary at the present versions."""
        values = self.trainer.canary.check(self.trainer.sync.versions)
        seen = f"mean |log-prob difference| to the trainer: policy {values[names.CANARY_POLICY]:.1e}"
        if names.CANARY_DRAFT in values:
            seen += (
                f", draft {values[names.CANARY_DRAFT]:.1e}, {values[names.CANARY_FAVOURITES]:.0%} of its tokens equal"
            )
        try:
            self.trainer.canary.require_agreement()
        except RunError as error:
            return Finding(check, FAIL, str(error).removeprefix("sync canary: "), "see docs/fidelity.md")
        return Finding(check, OK, seen)

    def transformers(self, what: str, directory: Path, proposals: list[Proposals], scores: ProposalScores) -> Finding:
        """The trainer's log-probs against those of plain transformers."""
        check, spec = f"{what} = transformers", self.task.spec
        if not is_small(spec):
            return skipped(check, "the model is too large for a CPU")
        wanted = reference_logprobs(directory, spec.architecture, proposals, self.temperature)
        difference = float(np.abs(wanted - scores.policy_logprobs).mean())
        seen = f"mean |log-prob difference| {difference:.1e} over {len(wanted)} tokens, limit {self.limit:g}"
        if difference <= self.limit:
            return Finding(check, OK, seen)
        return Finding(check, FAIL, seen, "the weights, config.json or the conversion are wrong")

    def losslessness(self) -> Finding:
        """Greedy and sampled responses with the draft and without."""
        check, lossless = "with = without draft", self.trainer.lossless
        if lossless is None:
            return skipped(check, "no draft, or not on a CPU")

        def see() -> str:
            values = lossless.check(self.running.engines, seed=1)
            return (
                f"{values[names.LOSSLESS_GREEDY]:.0%} of the greedy responses are equal; p = "
                f"{values[names.LOSSLESS_P_VALUE]:.2f} that sampled ones have one distribution"
            )

        return look(check, see)

    def exact_sampling(self) -> Finding:
        """Many short responses on a few tokens, against the probabilities that engines report for them."""
        check, level = "exact sampling", self.task.config.trainer.canary.lossless_level
        # Hot, so that many sequences occur.
        sampling = sliced_sampling(temperature=2.0)
        (responses,) = self.running.engines.generate([self.task.stream.prompts[0]], sampling, NUM_RESPONSES, seed=4)
        p_value, num_bins = chi_square(responses)
        if num_bins < 2:
            return skipped(check, "nearly all responses are the same")
        seen = f"chi-square of {len(responses)} responses over {num_bins} sequences: p = {p_value:.2g}"
        if p_value >= level:
            return Finding(check, OK, seen)
        return Finding(check, FAIL, f"{seen}, below {level:g}", "engines sample from another distribution; report it")

    def prefix_cache(self) -> Finding:
        """Greedy responses to the same prompts, the second time from the prefix cache."""
        prompts = list(self.task.stream.prompts[:8])
        first, second = (self._greedy(prompts, 32) for _ in range(2))
        equal = float(np.mean([mine == theirs for mine, theirs in zip(first, second, strict=True)]))
        seen = f"{equal:.0%} of the greedy responses are equal when their prompts are cached"
        # In bf16, rounding depends on the size of the batch.
        if equal == 1 or coarser_dtype(self.task.config) == "bf16":
            return Finding("prefix cache", OK, seen)
        return Finding("prefix cache", FAIL, seen, "set generator.inference_engine.enable_prefix_caching=false")

    def last_position(self) -> Finding:
        """A response up to the last token that a run may generate."""
        config, check = self.task.config, "last position"
        longest = max_input_length(config)
        token_ids = [token for prompt in self.task.stream.prompts for token in prompt.token_ids]
        token_ids = (token_ids * (1 + longest // len(token_ids)))[:longest]
        prompt = replace(self.task.stream.prompts[0], token_ids=token_ids)
        limit = config.generator.sampling_params.max_generate_length
        # As hot as vLLM allows, so that some response is long.
        sampling = SamplingConfig(max_generate_length=limit, temperature=2.0)
        groups = self.running.engines.generate([prompt], sampling, 32, seed=3)
        lengths = [len(generation.token_ids) for generation in groups[0]]
        if not all(math.isfinite(value) for generation in groups[0] for value in generation.logprobs):
            return Finding(check, FAIL, "log-probs that are not finite", "lower max_generate_length")
        if max(lengths) > limit:
            return Finding(check, FAIL, f"{max(lengths)} tokens where at most {limit} were asked for", "report it")
        if max(lengths) < limit:
            return skipped(
                check, f"not reached: the longest of {len(lengths)} responses has {max(lengths)} of {limit} tokens"
            )
        return Finding(check, OK, f"{longest} tokens of prompt and {limit} of response")

    def step(self) -> Finding:
        """One training step of policy and draft."""

        # Whether the model solves the prompts, always or never, does not matter here.
        self.trainer.estimate_advantages = lambda rewards_PG, _: np.ones(rewards_PG.shape)

        def see() -> str:
            values = self.trainer.train(self.trainer.sample())
            norms = {name: values[f"{name}/grad_norm"] for name in self.trainer.sync.components}
            still = [name for name, norm in norms.items() if not norm > 0]
            if still:
                raise RunError(f"the {' and the '.join(still)} got no gradient; report it")
            gap = values.get(names.ACCEPTANCE_GAP)
            seen = ", ".join(f"{name} gradient {norm:.2g}" for name, norm in norms.items())
            return seen + ("" if gap is None else f"; predicted less measured acceptance length {gap:+.2f}")

        return look("a training step", see)

    def export(self) -> Finding:
        """The trained weights, exported and read by transformers."""
        folder = Path(self.task.config.trainer.run_dir).resolve()
        with self.trainer.shifts.scoring():
            self.running.policy.save_hf(folder)
        try:
            spec = parse_spec(folder / "model", read_config(folder / "model"))
            require_tensors(str(folder / "model"), "export", tensor_shapes(spec))
        except ConfigError as error:
            return Finding("export = transformers", FAIL, str(error), "report it")
        proposals, scores = self.proposed()
        self.exported = Exported(folder, proposals, self._short_sampling(), _SEED)
        return self.transformers("export", folder / "model", proposals, scores)

    def _short_sampling(self) -> SamplingConfig:
        return SamplingConfig(max_generate_length=32, temperature=self.temperature)

    def _greedy(self, prompts: list[Prompt], length: int) -> list[list[int]]:
        sampling = SamplingConfig(max_generate_length=length, temperature=0.0)
        groups = self.running.engines.generate(prompts, sampling, 1, seed=2)
        return [generation.token_ids for group in groups for generation in group]


def depths(proposals: list[Proposals], scores: ProposalScores, limit: float) -> Finding:
    """The draft of engine and trainer by position in a draft: where they begin to differ tells what is wrong."""
    count = scores.draft_logprobs.shape[1]
    theirs = np.array([block for item in proposals for block in item.draft_logprobs])[:, :count]
    by_position = np.abs(theirs - scores.draft_logprobs).mean(axis=0)
    seen = "mean |log-prob difference| by drafted token " + ", ".join(f"{value:.0e}" for value in by_position)
    beyond = [position for position, value in enumerate(by_position, start=1) if not value <= limit]
    if not beyond:
        return Finding("draft by position", OK, seen)
    fix = "captured layers, norms or weights differ" if beyond[0] == 1 else "keys of the earlier drafted tokens differ"
    return Finding("draft by position", FAIL, f"{seen}; from token {beyond[0]} beyond {limit:g}", fix)
