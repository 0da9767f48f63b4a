"""Sampling: from prompts to scored groups of rollouts, with metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from skyrl_spec.algorithms.filters import Group
from skyrl_spec.controller.conversation import Conversation, Conversations
from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.requests import RunningRequests
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.envs.episodes import EnvResult
from skyrl_spec.envs.grader import Grader
from skyrl_spec.metrics import names
from skyrl_spec.metrics.acceptance import acceptance_metrics
from skyrl_spec.metrics.lengths import length_metrics
from skyrl_spec.rollout.seeds import prompt_seeds, seed_of
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.types import DraftedResponse, Generation, Prompt, Proposals, SampleRequest

# Limits of sample_with_drafts: prompts, and tokens of each response. Responses are sampled one after the other.
_NUM_SHOWN, _LONGEST_SHOWN = 2, 128
# Seconds to wait for an engine's answer before looking around.
_POLL_S = 1.0
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
        everyone = [conversation for group in groups for conversation in group]
        going_on, turn = everyone, 0
        while going_on:
            # Later turns have a seed each. The engine of a conversation has the keys of its turns before.
            num_each, turn_seed = (n, seed) if turn == 0 else (1, seed_of(seed, turn))
            seeds = self._seeds(going_on, num_each, turn_seed)
            self._play_turn(going_on, seeds, sampling, everyone)
            going_on = [conversation for conversation in going_on if conversation.is_open]
            turn += 1
        self.grader.end_episodes([conversation.number for conversation in everyone])
        rollouts = [[self.conversations.rollout(conversation) for conversation in group] for group in groups]
        print_failures(rollouts)
        return rollouts

    def _seeds(self, conversations: Sequence[Conversation], num_each: int, seed: int) -> list[int]:
        """A seed for each conversation. ``num_each`` that follow each other have one prompt; its seeds do so too."""
        num_engines, places = len(self._engines.handles), [one.place for one in conversations[::num_each]]
        seeds = {
            place: iter(prompt_seeds(seed * num_engines + place, places.count(place))) for place in sorted(set(places))
        }
        return [first + index for first in (next(seeds[place]) for place in places) for index in range(num_each)]

    def _play_turn(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        everyone: Sequence[Conversation],
    ) -> None:
        """Samples a turn of each conversation and appends what its environment answers. ``everyone``: the batch.

        An environment plays while other turns are still being sampled.
        """
        failures = [conversation.error for conversation in everyone if conversation.error is not None]
        futures: dict[int, Future[EnvResult]] = {}
        try:
            for indices, generations in self._answers(conversations, seeds, sampling):
                turns = self.conversations.add_turns([conversations[index] for index in indices], generations)
                futures |= {index: self.grader.submit(turn) for index, turn in zip(indices, turns, strict=True)}
        except BaseException:
            for future in futures.values():
                future.cancel()
            raise
        in_order = [futures[index] for index in range(len(conversations))]
        for conversation, result in zip(
            conversations, self.grader.results(in_order, failures, len(everyone)), strict=True
        ):
            self.conversations.take(conversation, result)

    def _answers(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Iterator[tuple[list[int], list[Generation]]]:
        """Yields turns as engines finish them: indices of conversations, and the generation of each."""
        requests = RunningRequests(self._engines, sampling, is_one_batch=True)
        for index, (conversation, seed) in enumerate(zip(conversations, seeds, strict=True)):
            requests.add(conversation.place, SampleRequest(index, conversation.input_ids, seed))
        start = last = time.perf_counter()
        while requests:
            if answers := requests.poll(_POLL_S):
                last = time.perf_counter()
                self.num_tokens += sum(len(generation.token_ids) for _, generation in answers)
                yield [index for index, _ in answers], [generation for _, generation in answers]
        self.generate_s += last - start


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
