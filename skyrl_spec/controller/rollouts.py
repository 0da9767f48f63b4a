"""Sampling: from prompts to scored groups of rollouts, with metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from skyrl_spec.algorithms.filters import Group
from skyrl_spec.controller.actors import EngineGroup
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.envs.grader import Grader
from skyrl_spec.envs.rewards import EnvResult
from skyrl_spec.metrics import names
from skyrl_spec.metrics.acceptance import acceptance_metrics
from skyrl_spec.metrics.lengths import length_metrics
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.types import DraftedResponse, Generation, Prompt, Proposals, Rollout

# Limits of sample_with_drafts: prompts, and tokens of each response. Responses are sampled one after the other.
_NUM_SHOWN, _LONGEST_SHOWN = 2, 128
# Failures of a batch that are printed one by one.
_NUM_FAILURES_SHOWN = 3


class RolloutSampler:
    """Generates with the engines and scores with the environments."""

    def __init__(self, config: Config, engines: EngineGroup, tokenizer: Any):
        self._config, self._engines, self._tokenizer = config, engines, tokenizer
        self._grader = Grader(config.environment)
        self._has_draft = build_speculative_config(config) is not None
        self.num_train_calls = 0
        self.num_tokens, self.generate_s = 0, 0.0

    def sample_for_training(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Groups of one batch. The seed depends on the number of earlier batches, not on evaluations."""
        self.num_train_calls += 1
        generator, seed = self._config.generator, self._config.trainer.seed
        return self._sample(
            prompts, generator.sampling_params, generator.n_samples_per_prompt, seed * 1_000_003 + self.num_train_calls
        )

    def sample_for_evaluation(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Groups sampled with ``generator.eval_sampling_params``, always with the same seed."""
        generator = self._config.generator
        return self._sample(prompts, generator.eval_sampling_params, generator.eval_n_samples_per_prompt, seed=0)

    def sample_with_drafts(self, prompts: Sequence[Prompt]) -> list[DraftedResponse]:
        """Beginnings of a few responses, with the source of each token: an accepted draft token, or the policy.

        Empty if the engines have no draft that gives a distribution. The responses are cut, so they are not scored.
        """
        if not self._has_draft:
            return []
        sampling = self._config.generator.sampling_params
        sampling = replace(sampling, max_generate_length=min(sampling.max_generate_length, _LONGEST_SHOWN), stop=[])
        shown = list(prompts[:_NUM_SHOWN])
        answers = self._engines.propose_on_one([prompt.token_ids for prompt in shown], sampling, seed=0)
        return [
            DraftedResponse(prompt, answer.generation, _pieces(self._tokenizer, answer))
            for prompt, answer in zip(shown, answers, strict=True)
            if answer.anchors
        ]

    def close(self) -> None:
        """Ends the process that scores."""
        self._grader.close()

    def _sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, n: int, seed: int) -> list[Group]:
        """``n`` scored rollouts of each prompt. Adds to ``num_tokens`` and ``generate_s``."""
        start = time.perf_counter()
        generations = self._engines.generate(list(prompts), sampling, n, seed)
        self.generate_s += time.perf_counter() - start
        self.num_tokens += sum(len(g.token_ids) for group in generations for g in group)
        return self._score(prompts, generations)

    def _score(self, prompts: Sequence[Prompt], generations: list[list[Generation]]) -> list[Group]:
        flat = [
            (prompt, generation) for prompt, group in zip(prompts, generations, strict=True) for generation in group
        ]
        texts = self._tokenizer.batch_decode([g.token_ids for _, g in flat], skip_special_tokens=True)
        results = self._grader.score_all([prompt for prompt, _ in flat], texts)
        _print_failures([result.error for result in results if result.error is not None])
        rollouts = [
            self._rollout(prompt, generation, text, result)
            for (prompt, generation), text, result in zip(flat, texts, results, strict=True)
        ]
        ends = np.cumsum([len(group) for group in generations])
        return [rollouts[end - len(group) : end] for end, group in zip(ends, generations, strict=True)]

    def _rollout(self, prompt: Prompt, generation: Generation, text: str, result: EnvResult) -> Rollout:
        generator, is_cut = self._config.generator, generation.finish_reason != "stop"
        reward = 0.0 if is_cut and generator.zero_reward_on_non_stop else result.reward
        is_trained_on = int(not (is_cut and generator.apply_overlong_filtering))
        return Rollout(prompt, generation, text, reward, [is_trained_on] * len(generation.token_ids), result.error)


def _pieces(tokenizer: Any, answer: Proposals) -> list[tuple[str, bool]]:
    """Text of each token, and whether it was drafted. A character of several tokens belongs to the last of them."""
    ids, pieces, before = answer.generation.token_ids, [], ""
    for end, accepted in enumerate(answer.accepted(), start=1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True).rstrip("\ufffd")
        pieces.append((text[len(before) :], accepted))
        before = text
    return pieces


def _print_failures(errors: Sequence[str]) -> None:
    """Prints the first errors of a batch, and the number of the others."""
    for error in errors[:_NUM_FAILURES_SHOWN]:
        print(f"skyrl-spec: warning: a response could not be scored and gets reward 0: {error}", file=sys.stderr)
    if len(errors) > _NUM_FAILURES_SHOWN:
        print(f"skyrl-spec: warning: and {len(errors) - _NUM_FAILURES_SHOWN} more of this batch", file=sys.stderr)


def reward_metrics(groups: Sequence[Group], num_samples: int) -> dict[str, float]:
    """Mean reward, share of prompts with at least one rewarded response, and number of responses without a score."""
    rewards = [rollout.reward for group in groups for rollout in group]
    num_failed = sum(rollout.error is not None for group in groups for rollout in group)
    solved = [any(rollout.reward > 0 for rollout in group) for group in groups]
    return {
        names.AVG_RAW_REWARD: float(np.mean(rewards)),
        names.pass_at(num_samples): float(np.mean(solved)),
        names.NUM_FAILED: num_failed,
    }


class SpeculationMeter:
    """Metrics of drafts between two readings of the engines' counters. Empty if the engines have no draft."""

    def __init__(self, engines: EngineGroup, mode: str):
        self._engines, self._mode = engines, mode
        self._start = engines.spec_counters()
        engines.read_lengths()

    def metrics(self) -> dict[str, float]:
        counters = self._engines.spec_counters() - self._start
        lengths = length_metrics(self._engines.read_lengths()) if self._mode == "train" else {}
        return acceptance_metrics(counters, f"vllm/{self._mode}") | lengths
