"""Drafts that are sampled (``draft_sample_method=probabilistic``): exact sampling, seeds, and what the canary sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from changing_lengths import ChangingLengths
from engine_process import EngineProcess
from exact import generate, sequence_p_value
from tiny_models import LONG_PROMPT, MTP, PROMPT, dflash

from skyrl_spec.rollout.step_times import lengths_to_try
from skyrl_spec.settings.schema import SamplingConfig

LEVEL = 1e-3
EVERY_LENGTH = lengths_to_try(3, has_model=True)
SAMPLED = {"draft_sample_method": "probabilistic"}


@pytest.fixture(scope="module")
def sampling_drafts(
    kind: str, target: Path, dflash_dir: Path, start_engine: Callable[..., EngineProcess]
) -> EngineProcess:
    """Drafts of another length in every step."""
    draft = (MTP if kind == "mtp" else dflash(dflash_dir / "d0")) | SAMPLED
    return start_engine(
        ChangingLengths, (EVERY_LENGTH,), model_path=str(target), speculative_config=draft, schedule="auto"
    )


def test_responses_have_their_exact_joint_distribution(sampling_drafts: EngineProcess, target: Path) -> None:
    assert sequence_p_value(sampling_drafts, target, SamplingConfig(temperature=0.7), num_tokens=6) > LEVEL


def test_truncated_sampling_is_exact_too(sampling_drafts: EngineProcess, target: Path) -> None:
    sampling = SamplingConfig(temperature=1.0, top_k=20, top_p=0.9)
    assert sequence_p_value(sampling_drafts, target, sampling, num_tokens=4) > LEVEL


def test_greedy_responses_are_those_of_greedy_drafts(
    sampling_drafts: EngineProcess, target: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    plain = start_engine(model_path=str(target), speculative_config=None)
    sampling = SamplingConfig(temperature=0.0, max_generate_length=40)
    with_draft, without = (
        generate(engine, [PROMPT, LONG_PROMPT[:200]], sampling) for engine in (sampling_drafts, plain)
    )
    assert [[g.token_ids for g in group] for group in with_draft] == [[g.token_ids for g in group] for group in without]


def test_a_response_depends_on_its_seed_alone(
    kind: str, target: Path, dflash_dir: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    """Not on other requests in the batch or before it, whose drafts are sampled too."""
    draft = (MTP if kind == "mtp" else dflash(dflash_dir / "d0")) | SAMPLED
    engine = start_engine(model_path=str(target), speculative_config=draft)
    sampling = SamplingConfig(max_generate_length=40)

    def first_response(prompts: list[list[int]]) -> list[int]:
        return generate(engine, prompts, sampling, seed=7)[0][0].token_ids

    alone = first_response([PROMPT])
    assert first_response([PROMPT, [9], [60, 61, 62]]) == alone
    assert first_response([PROMPT]) == alone


def test_recorded_drafts_are_greedy_and_later_ones_sampled_again(
    kind: str, target: Path, dflash_dir: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    draft = MTP if kind == "mtp" else dflash(dflash_dir / "d0")
    sampled, greedy = (
        start_engine(model_path=str(target), speculative_config=config) for config in (draft | SAMPLED, draft)
    )
    # Greedy responses, so that both engines draft at the same places.
    sampling = SamplingConfig(temperature=0.0, max_generate_length=20)
    blocks = [engine.propose([PROMPT], sampling, 0)[0].drafted for engine in (sampled, greedy)]
    assert blocks[0] == blocks[1]
    rates = []
    for engine in (sampled, greedy):
        before = engine.spec_counters()
        generate(engine, [PROMPT], SamplingConfig(max_generate_length=40), n=64)
        counters = engine.spec_counters() - before
        rates.append(counters.num_accepted_tokens_per_pos[0] / counters.num_drafts)
    # Of random weights, a sampled draft agrees with the policy at another rate than the most probable token.
    assert abs(rates[0] - rates[1]) > 0.02
