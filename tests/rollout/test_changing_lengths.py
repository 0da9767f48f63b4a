"""Drafts whose length changes in the middle of a response: exact sampling, and the same drafts at the same places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from changing_lengths import ChangingLengths
from engine_process import EngineProcess
from exact import generate, sequence_p_value
from faulty_engines import LossyEngine
from tiny_models import LONG_PROMPT, MTP, PROMPT, dflash

from skyrl_spec.rollout.step_times import OFF, lengths_to_measure, lengths_to_try
from skyrl_spec.settings.schema import SamplingConfig

LEVEL = 1e-3
SAMPLING = SamplingConfig(temperature=0.7)
EVERY_LENGTH = lengths_to_try(3, has_model=True)
MEASURED = lengths_to_measure(EVERY_LENGTH)


@pytest.fixture(scope="module")
def changing(kind: str, target: Path, dflash_dir: Path, start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    draft = MTP if kind == "mtp" else dflash(dflash_dir / "d0")
    return start_engine(
        ChangingLengths, (EVERY_LENGTH,), model_path=str(target), speculative_config=draft, schedule="auto"
    )


@pytest.fixture(scope="module")
def plain(target: Path, start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    return start_engine(model_path=str(target), speculative_config=None)


def test_responses_have_their_exact_joint_distribution(changing: EngineProcess, target: Path) -> None:
    assert sequence_p_value(changing, target, SAMPLING, num_tokens=6) > LEVEL


def test_truncated_sampling_is_exact_too(changing: EngineProcess, target: Path) -> None:
    sampling = SamplingConfig(temperature=1.0, top_k=20, top_p=0.9)
    assert sequence_p_value(changing, target, sampling, num_tokens=4) > LEVEL


def test_greedy_responses_are_those_without_a_draft(changing: EngineProcess, plain: EngineProcess) -> None:
    sampling = SamplingConfig(temperature=0.0, max_generate_length=40)
    prompts = [PROMPT, [9], [60, 61, 62], LONG_PROMPT[:200]]
    for _ in range(4):
        with_draft, without = (generate(engine, prompts, sampling) for engine in (changing, plain))
        assert [[g.token_ids for g in group] for group in with_draft] == [
            [g.token_ids for g in group] for group in without
        ]


def test_counters_know_how_many_drafts_had_a_position(changing: EngineProcess) -> None:
    before = changing.spec_counters()
    generate(changing, [PROMPT, [9]], SamplingConfig(max_generate_length=60), n=16)
    counters = changing.spec_counters() - before
    first, second, third = counters.num_drafts_per_pos
    assert first == counters.num_drafts > second > third > 0
    assert first + second + third == counters.num_draft_tokens
    assert all(a <= d for a, d in zip(counters.num_accepted_tokens_per_pos, counters.drafts_per_pos, strict=True))


def test_drafts_after_steps_without_one_are_those_of_an_engine_that_always_drafts(changing: EngineProcess) -> None:
    """At length 0 the drafter's first pass fills in its keys, so later drafts are the same. Off, it lacks them."""
    always = {draft.after: draft for draft in changing.drafts(PROMPT, 30, [3] * 40)}

    def difference(lengths: list[int]) -> float:
        # Another response overwrites the keys, which would otherwise still be there from the time before.
        changing.drafts([60, 61, 62], 30, [3] * 40)
        # Other lengths lead to other places, so only some of them are the same.
        drafts = [draft for draft in changing.drafts(PROMPT, 30, lengths + [3] * 40) if len(draft.tokens) == 3]
        pairs = [(draft, always[draft.after]) for draft in drafts if draft.after in always]
        assert len(pairs) >= 3
        # The first token of a draft depends on nothing but the response.
        return max(abs(one.logprobs[0] - other.logprobs[0]) for one, other in pairs)

    assert difference([0] * 6) < 1e-4
    assert difference([2, 0, 1, 0, 0, 3, 1]) < 1e-4
    assert difference([OFF] * 6) > 1e-3


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLING, SamplingConfig(top_k=8)])
def test_steps_without_drafts_sample_like_an_engine_that_has_none(
    changing: EngineProcess, plain: EngineProcess, sampling: SamplingConfig
) -> None:
    sampling = replace(sampling, max_generate_length=30)
    ((expected,),) = generate(plain, [PROMPT], sampling, seed=7)
    for length in (OFF, 0):
        response = changing.verified_by(PROMPT, sampling, [length])
        assert (response.tokens, response.logprobs) == (expected.token_ids, expected.logprobs)
        # Nothing was verified, so the rejection sampler had no work.
        assert response.numbers == []
    # With drafts it is called, and only for steps that have some.
    assert set(changing.verified_by(PROMPT, sampling, [2, 0, OFF, 3, 1]).numbers) == {1, 2, 3}


def test_an_engine_calibrates_itself_and_then_chooses(
    models_dir: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    engine = start_engine(schedule="auto", max_num_seqs=8)
    before = engine.spec_counters()
    sizes, seconds = engine.calibrate([PROMPT, [9]], SamplingConfig(max_generate_length=20), 100)
    assert sizes == [1, 4, 8]
    assert all(len(row) == len(MEASURED) and min(row) > 0 for row in seconds)
    # The calibration tries the lengths that it measures.
    assert min((engine.spec_counters() - before).num_drafts_per_pos) > 0
    engine.read_lengths()
    for _ in range(20):
        generate(engine, [PROMPT, [9]], SamplingConfig(max_generate_length=20), n=4)
    log = engine.read_lengths()
    assert sum(map(sum, log.steps)) > 100
    assert all(expected > 0 for expected, spent in zip(log.expected_tokens, log.seconds, strict=True) if spent)
    # Which of them pays is the machine's to say.
    assert set(engine._call_speculation("planned_lengths")) <= set(EVERY_LENGTH)
    # The canary sees drafts of one length, whatever is planned.
    (proposals,) = engine.propose([PROMPT], SamplingConfig(max_generate_length=12), 0)
    assert {len(block) for block in proposals.drafted} == {3}


def test_a_table_is_followed(models_dir: Path, start_engine: Callable[..., EngineProcess]) -> None:
    engine = start_engine(schedule=[[1, 2, 3], [3, 4, 1], [5, 8, 0]], max_num_seqs=8)
    assert engine.calibrate([PROMPT], SAMPLING, 8) is None
    generate(engine, [PROMPT], SamplingConfig(max_generate_length=30), n=8)
    log = engine.read_lengths()
    # Bins 1, 2 to 3, 4 to 7, 8. Columns: off, 0, 1, 2, 3.
    lengths = [{length - 1 for length, steps in enumerate(row) if steps} for row in log.steps]
    assert lengths[3] == {0}
    assert lengths[2] <= {0, 1}
    assert lengths[1] <= {1, 3}
    assert lengths[0] <= {3}
    assert log.steps[3][1] > 5


def test_the_test_catches_a_lossy_sampler(models_dir: Path, start_engine: Callable[..., EngineProcess]) -> None:
    lossy = start_engine(LossyEngine, (0.5,), schedule=[[1, 8, 3], [9, 256, 1]])
    assert sequence_p_value(lossy, models_dir / "w0", SAMPLING, num_tokens=4) < 1e-6
