"""Updates of an engine's weights, and its comparison with a fresh engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine_process import EngineProcess
from exact import generate
from tiny_models import LONG_PROMPT, PROMPT

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Generation, SpecCounters

GREEDY = SamplingConfig(temperature=0.0, max_generate_length=32)
PROMPTS = [PROMPT, [9], [60, 61, 62], LONG_PROMPT]


def update(engine: EngineProcess, draft: bool, payloads: Iterable[dict[str, Any]]) -> None:
    engine.start_weight_update(draft)
    for payload in payloads:
        engine.update_weights(payload)
    engine.finish_weight_update()


def run(engine: EngineProcess) -> tuple[list[Generation], SpecCounters]:
    before = engine.spec_counters()
    samples = [group[0] for group in generate(engine, PROMPTS, GREEDY)]
    return samples, engine.spec_counters() - before


def assert_equals_fresh(engine: EngineProcess, fresh: EngineProcess) -> None:
    """Asserts equal tokens and acceptance, and log-probs that are equal bit for bit."""
    fresh.reset_prefix_cache()
    (samples, counters), (expected, expected_counters) = run(engine), run(fresh)
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in expected]
    assert [sample.logprobs for sample in samples] == [sample.logprobs for sample in expected]
    assert counters == expected_counters
