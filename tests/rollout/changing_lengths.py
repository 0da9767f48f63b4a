"""An engine whose drafts have another length in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.rollout.lengths import LengthTable
from skyrl_spec.settings.schema import SamplingConfig


class GivenLengths(LengthTable):
    """Lengths from a list, from its beginning whenever the engine was idle. The last one goes on for ever."""

    def __init__(self, lengths: Sequence[int]):
        super().__init__([])
        self._given, self._num_chosen = list(lengths), 0

    def begin(self) -> None:
        self._num_chosen = 0

    def choose(self, batch_size: int) -> int:
        self._num_chosen += 1
        return self._given[min(self._num_chosen, len(self._given)) - 1]


class RandomLengths(LengthTable):
    """Random lengths among some."""

    def __init__(self, among: Sequence[int]):
        super().__init__([])
        self._among, self._random = list(among), np.random.default_rng(0)

    def choose(self, batch_size: int) -> int:
        return int(self._random.choice(self._among))


@dataclass
class Draft:
    """Drafted tokens with the draft's log-probs, and the index of the response token that they follow."""

    after: int
    tokens: list[int]
    logprobs: list[float]


@dataclass
class VerifiedBy:
    """A response, and how many drafted tokens each call of vLLM's rejection sampler verified."""

    tokens: list[int]
    logprobs: list[float]
    numbers: list[int]


class ChangingLengths(RolloutEngine):
    """An engine with a schedule whose lengths a test gives. ``among``: draw them from these."""

    def __init__(self, settings: EngineSettings, among: Sequence[int] | None = None):
        super().__init__(settings)
        if among is not None:
            self._speculation()._lengths = RandomLengths(among)

    def drafts(self, prompt: list[int], num_tokens: int, lengths: Sequence[int]) -> list[Draft]:
        """Drafts along a greedy response that was sampled with these lengths, one for each step. Alone in its batch."""
        self._speculation()._lengths = GivenLengths(lengths)
        self.reset_prefix_cache()
        self._llm.collective_rpc("start_recording_drafts")
        try:
            sampling = SamplingConfig(temperature=0.0, max_generate_length=num_tokens)
            ((response,),) = self.generate([prompt], sampling, 1, None)
            drafted = self._llm.collective_rpc("take_recorded_drafts")[0]
        finally:
            self._llm.collective_rpc("stop_recording_drafts")
        return _split(response.token_ids, *drafted, lengths)

    def verified_by(self, prompt: list[int], sampling: SamplingConfig, lengths: Sequence[int]) -> VerifiedBy:
        """Samples a response with these lengths."""
        from vllm.v1.sample import rejection_sampler

        upstream, numbers = rejection_sampler.rejection_sample, []

        def rejection_sample(draft_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
            numbers.append(len(draft_token_ids))
            return upstream(draft_token_ids, *args, **kwargs)

        self._speculation()._lengths = GivenLengths(lengths)
        rejection_sampler.rejection_sample = rejection_sample
        try:
            ((response,),) = self.generate([prompt], sampling, 1, 7)
        finally:
            rejection_sampler.rejection_sample = upstream
        return VerifiedBy(response.token_ids, response.logprobs, numbers)

    def _speculation(self) -> Any:
        core: Any = self._llm.llm_engine.engine_core
        return core.engine_core.scheduler.speculation


def _split(response: list[int], drafted: list[int], logprobs: list[float], lengths: Sequence[int]) -> list[Draft]:
    drafts, position, start = [], 0, 0
    for length in lengths:
        end = start + max(length, 0)
        tokens, their_logprobs, start = drafted[start:end], logprobs[start:end], end
        if position + 1 >= len(response):
            break
        drafts.append(Draft(position, tokens, their_logprobs))
        following = response[position + 1 :]
        equal = [token == other for token, other in zip(tokens, following, strict=False)]
        position += 1 + (equal.index(False) if False in equal else len(equal))
    return drafts
