"""Samples of real engines: tokens, log-probs, and their distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess
from exact import assert_exact_logprobs, generate, second_token_p_value, token_p_values
from tiny_models import EOS_TOKEN, LONG_PROMPT, MAX_MODEL_LEN, PROMPT

from skyrl_spec.errors import ConfigError
from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings, context_len
from skyrl_spec.rollout.requests import Requests
from skyrl_spec.rollout.sleep import Sleep
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import SpecCounters, Versions

SAMPLINGS = {
    "temperature 1": SamplingConfig(),
    "temperature 0.7": SamplingConfig(temperature=0.7),
    "top-k": SamplingConfig(top_k=8),
    "top-p": SamplingConfig(temperature=1.2, top_p=0.8),
    "top-k and top-p": SamplingConfig(temperature=0.7, top_k=20, top_p=0.9),
}
PROMPTS = [PROMPT, [9], list(range(2, 40)), [60, 61, 62]]


@pytest.fixture(scope="module")
def plain_engine(start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    """An engine with ``w0`` and no draft."""
    return start_engine(speculative_config=None)


@pytest.fixture(params=["mtp", "dflash"])
def drafting(request: pytest.FixtureRequest) -> tuple[EngineProcess, Path]:
    """An engine with a draft, and its target."""
    if request.param == "mtp":
        return request.getfixturevalue("engine"), request.getfixturevalue("models_dir") / "w0"
    return request.getfixturevalue("dflash_engine"), request.getfixturevalue("dflash_dir") / "t0"


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_samples_come_from_the_exact_distribution(
    drafting: tuple[EngineProcess, Path], sampling: SamplingConfig
) -> None:
    engine, target = drafting
    before = engine.spec_counters()
    # The second and third token can be drafted. The third one's draft counts if the second one's was accepted.
    assert min(token_p_values(engine, target, sampling, (1, 2))) > 0.001
    drafted = engine.spec_counters() - before
    # Some drafted tokens are accepted and some are not.
    assert 0.1 < drafted.num_accepted_tokens_per_pos[0] / drafted.num_drafts < 0.9


def test_seeded_samples_come_from_the_exact_distribution(engine: EngineProcess, models_dir: Path) -> None:
    assert second_token_p_value(engine, models_dir / "w0", SamplingConfig(), seed=11) > 0.001


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_logprobs_are_of_the_distribution_sampled_from(
    engine: EngineProcess, plain_engine: EngineProcess, models_dir: Path, sampling: SamplingConfig
) -> None:
    for served_by in (engine, plain_engine):
        for prompt, samples in zip(PROMPTS, generate(served_by, PROMPTS, sampling, n=4), strict=True):
            assert_exact_logprobs(samples, prompt, models_dir / "w0", sampling)


def test_temperature_0_with_the_draft_equals_without(
    engine: EngineProcess, plain_engine: EngineProcess, models_dir: Path
) -> None:
    greedy = SamplingConfig(temperature=0.0, max_generate_length=24)
    with_draft, without = generate(engine, PROMPTS, greedy), generate(plain_engine, PROMPTS, greedy)
    for prompt, (drafted,), (plain,) in zip(PROMPTS, with_draft, without, strict=True):
        assert drafted.token_ids == plain.token_ids
        assert drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
        assert_exact_logprobs([drafted], prompt, models_dir / "w0", greedy)


def test_temperature_0_with_a_dflash_draft_equals_without(
    dflash_engine: EngineProcess, start_engine: Callable[..., EngineProcess], dflash_dir: Path
) -> None:
    plain = start_engine(model_path=str(dflash_dir / "t0"), speculative_config=None)
    greedy = SamplingConfig(temperature=0.0, max_generate_length=24)
    with_draft, without = generate(dflash_engine, PROMPTS, greedy), generate(plain, PROMPTS, greedy)
    assert [[sample.token_ids for sample in group] for group in with_draft] == [
        [sample.token_ids for sample in group] for group in without
    ]


def test_a_seed_fixes_each_response_whatever_else_is_in_the_batch(engine: EngineProcess) -> None:
    sampling = SamplingConfig(max_generate_length=12)
    first = generate(engine, [PROMPT, [9]], sampling, n=3, seed=5)
    again = generate(engine, [PROMPT, [9], [60]], sampling, n=3, seed=5)[:2]
    other = generate(engine, [PROMPT, [9]], sampling, n=3, seed=6)
    tokens = [[sample.token_ids for group in groups for sample in group] for groups in (first, again, other)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert len({tuple(ids) for ids in tokens[0]}) == 6


def test_responses_end_at_the_end_token_or_the_limit(engine: EngineProcess) -> None:
    samples = generate(engine, [PROMPT], SamplingConfig(temperature=1.5, max_generate_length=40), n=64)[0]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert len(sample.logprobs) == len(sample.token_ids)
        assert (EOS_TOKEN in sample.token_ids) == (sample.finish_reason == "stop")
        assert EOS_TOKEN not in sample.token_ids[:-1]
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 40


def test_responses_stay_within_the_context(drafting: tuple[EngineProcess, Path]) -> None:
    engine, target = drafting
    samples = generate(engine, [LONG_PROMPT], SamplingConfig(max_generate_length=100), n=16)[0]
    full = [sample for sample in samples if sample.finish_reason == "length"]
    assert full
    assert {len(sample.token_ids) for sample in full} == {MAX_MODEL_LEN - len(LONG_PROMPT)}
    assert_exact_logprobs(full, LONG_PROMPT, target, SamplingConfig())
    with pytest.raises(ValueError, match=f"a prompt of {MAX_MODEL_LEN} tokens fills max_model_len={MAX_MODEL_LEN}"):
        generate(engine, [[5] * MAX_MODEL_LEN], SamplingConfig())


def test_a_response_at_its_limit_leaves_the_drafting_of_others_alone(drafting: tuple[EngineProcess, Path]) -> None:
    engine, _ = drafting

    def greedy_counters(prompts: list[list[int]]) -> SpecCounters:
        engine.reset_prefix_cache()
        before = engine.spec_counters()
        generate(engine, prompts, SamplingConfig(temperature=0.0, max_generate_length=40))
        return engine.spec_counters() - before

    alone = [greedy_counters([prompt]) for prompt in (PROMPT, LONG_PROMPT)]
    assert greedy_counters([PROMPT, LONG_PROMPT]) == alone[0] + alone[1]


def test_generations_carry_the_versions(plain_engine: EngineProcess) -> None:
    short = SamplingConfig(max_generate_length=2)
    assert generate(plain_engine, [PROMPT], short)[0][0].versions == Versions()
    plain_engine.set_versions(Versions(policy=3, draft=2))
    assert generate(plain_engine, [PROMPT], short)[0][0].versions == Versions(3, 2)


def test_counters_add_up(engine: EngineProcess, plain_engine: EngineProcess) -> None:
    before = engine.spec_counters()
    (sample,) = generate(engine, [PROMPT], SamplingConfig(temperature=0.0, max_generate_length=21))[0]
    counters = engine.spec_counters() - before
    assert sum(counters.num_accepted_tokens_per_pos) == counters.num_accepted_tokens
    assert counters.num_draft_tokens == 3 * counters.num_drafts
    # One token of the prefill, then every draft yields its accepted tokens and one more; the last may overshoot.
    assert 0 <= 1 + counters.num_drafts + counters.num_accepted_tokens - len(sample.token_ids) <= 3
    assert plain_engine.spec_counters() == SpecCounters()


def test_min_p_with_a_draft_is_refused(engine: EngineProcess) -> None:
    with pytest.raises(ConfigError, match="min_p"):
        generate(engine, [PROMPT], SamplingConfig(min_p=0.1))


@pytest.mark.parametrize(("device", "num_drafts"), [("cpu", 2), ("cuda", 3)])
def test_there_is_room_for_the_drafts_under_way(models_dir: Path, device: str, num_drafts: int) -> None:
    speculative = {"method": "mtp", "num_speculative_tokens": 3}
    settings = EngineSettings(str(models_dir / "w0"), device=device, max_model_len=16, speculative_config=speculative)
    assert context_len(settings) == 16 + 3 * num_drafts


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_requests_are_seeded_on_cpu_alone(device: str) -> None:
    """vLLM's engine is replaced, because there is no GPU."""

    class Asked(Requests):
        def __init__(self) -> None:
            self.params: list[Any] = []

        def add(self, prompt: Any, params: Any) -> str:
            self.params.append(params)
            return ""

        def run(self, names: Sequence[str]) -> list[Any]:
            return []

    engine = RolloutEngine.__new__(RolloutEngine)
    engine._settings, engine._versions, engine._requests = EngineSettings("", device=device), Versions(), Asked()
    engine._sleep = Sleep(("policy",))
    engine.generate([PROMPT, PROMPT], SamplingConfig(), n=2, seed=5)
    seeds = [params.seed for params in engine._requests.params]
    assert [seed is None for seed in seeds] == [device == "cuda"] * 2
    assert device == "cuda" or seeds[0] != seeds[1]
