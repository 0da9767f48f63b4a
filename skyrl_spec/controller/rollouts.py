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
from skyrl_spec.controller.conversation import Conversation, Conversations
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.envs.grader import Grader
from skyrl_spec.metrics import names
from skyrl_spec.metrics.acceptance import acceptance_metrics
from skyrl_spec.metrics.lengths import length_metrics
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.types import DraftedResponse, Generation, Prompt, Proposals

# Limits of sample_with_drafts: prompts, and tokens of each response. Responses are sampled one after the other.
_NUM_SHOWN, _LONGEST_SHOWN = 2, 128
# Failures of a batch that are printed one by one.
_NUM_FAILURES_SHOWN = 3


class RolloutSampler:
    """Generates with the engines and scores with the environments."""

    def __init__(self, config: Config, engines: EngineGroup, tokenizer: Any):
        self._config, self._engines, self._tokenizer = config, engines, tokenizer
        self.grader = Grader(config.environment)
        self.conversations = Conversations(config, tokenizer)
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
        self.grader.close()

    def _sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, n: int, seed: int) -> list[Group]:
        """``n`` scored rollouts of each prompt. Adds to ``num_tokens`` and ``generate_s``."""
        places = self._engines.places(len(prompts))
        begin = self.conversations.begin
        groups = [[begin(prompt, place) for _ in range(n)] for prompt, place in zip(prompts, places, strict=True)]
        everyone = going_on = [conversation for group in groups for conversation in group]
        generations = self._generate(prompts, sampling, n, seed, places)
        self._play(going_on, [generation for group in generations for generation in group], everyone)
        turn = 1
        while going_on := [conversation for conversation in going_on if conversation.is_open]:
            inputs = [replace(conversation.prompt, token_ids=conversation.input_ids) for conversation in going_on]
            # The engine that has the keys of the turns before.
            places = [conversation.place for conversation in going_on]
            answers = self._generate(inputs, sampling, 1, seed_of(seed, turn), places)
            self._play(going_on, [answer for (answer,) in answers], everyone)
            turn += 1
        self.grader.end_episodes([conversation.number for conversation in everyone])
        rollouts = [[self.conversations.rollout(conversation) for conversation in group] for group in groups]
        print_failures(rollouts)
        return rollouts

    def _generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, n: int, seed: int, places: Sequence[int]
    ) -> list[list[Generation]]:
        start = time.perf_counter()
        generations = self._engines.generate(list(prompts), sampling, n, seed, places)
        self.generate_s += time.perf_counter() - start
        self.num_tokens += sum(len(g.token_ids) for group in generations for g in group)
        return generations

    def _play(
        self,
        conversations: Sequence[Conversation],
        generations: Sequence[Generation],
        everyone: Sequence[Conversation],
    ) -> None:
        """Plays a turn of each conversation, and appends what their environments answer. ``everyone``: the batch."""
        failures = [conversation.error for conversation in everyone if conversation.error is not None]
        turns = self.conversations.add_turns(conversations, generations)
        results = self.grader.play_all(turns, failures, len(everyone))
        for conversation, result in zip(conversations, results, strict=True):
            self.conversations.take(conversation, result)


def seed_of(*numbers: int) -> int:
    """A seed that other numbers do not share."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def _pieces(tokenizer: Any, answer: Proposals) -> list[tuple[str, bool]]:
    """Text of each token, and whether it was drafted. A character of several tokens belongs to the last of them."""
    ids, pieces, before = answer.generation.token_ids, [], ""
    for end, accepted in enumerate(answer.accepted(), start=1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True).rstrip("\ufffd")
        pieces.append((text[len(before) :], accepted))
        before = text
    return pieces


def print_failures(groups: Sequence[Group]) -> list[str]:
    """Prints the first errors of a batch, and the number of the others. Returns all."""
    errors = [rollout.error for group in groups for rollout in group if rollout.error is not None]
    for error in errors[:_NUM_FAILURES_SHOWN]:
        print(f"skyrl-spec: warning: a response could not be scored and gets reward 0: {error}", file=sys.stderr)
    if len(errors) > _NUM_FAILURES_SHOWN:
        print(f"skyrl-spec: warning: and {len(errors) - _NUM_FAILURES_SHOWN} more of this batch", file=sys.stderr)
    return errors


def reward_metrics(groups: Sequence[Group], num_samples: int, max_turns: int = 1) -> dict[str, float]:
    """Mean reward, share of prompts with at least one rewarded response, and number of responses without a score."""
    rewards = [rollout.reward for group in groups for rollout in group]
    num_failed = sum(rollout.error is not None for group in groups for rollout in group)
    turns = [rollout.num_turns for group in groups for rollout in group]
    solved = [any(rollout.reward > 0 for rollout in group) for group in groups]
    return {
        names.AVG_RAW_REWARD: float(np.mean(rewards)),
        names.pass_at(num_samples): float(np.mean(solved)),
        names.NUM_FAILED: num_failed,
    } | ({names.NUM_TURNS: float(np.mean(turns))} if max_turns > 1 else {})


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
