"""Updating an engine's weights, and holding it against a fresh engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
from ray.actor import ActorHandle
from tiny_models import LONG_PROMPT, PROMPT, generate

from skyrl_spec.config import SamplingConfig
from skyrl_spec.types import Generation, SpecCounters

GREEDY = SamplingConfig(temperature=0.0, max_generate_length=32)
PROMPTS = [PROMPT, [9], [60, 61, 62], LONG_PROMPT]


def update(engine: ActorHandle, draft: bool, payloads: Iterable[dict[str, Any]]) -> None:
    ray.get(engine.start_weight_update.remote(draft))
    for payload in payloads:
        ray.get(engine.update_weights.remote(ray.put(payload)))
    ray.get(engine.finish_weight_update.remote())


def run(engine: ActorHandle) -> tuple[list[Generation], SpecCounters]:
    before = ray.get(engine.spec_counters.remote())
    samples = [group[0] for group in generate(engine, PROMPTS, GREEDY)]
    return samples, ray.get(engine.spec_counters.remote()) - before


def assert_equals_fresh(engine: ActorHandle, fresh: ActorHandle) -> None:
    """Tokens and acceptance equal, log-probs bit for bit."""
    ray.get(fresh.reset_prefix_cache.remote())
    (samples, counters), (expected, expected_counters) = run(engine), run(fresh)
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in expected]
    assert [sample.logprobs for sample in samples] == [sample.logprobs for sample in expected]
    assert counters == expected_counters
