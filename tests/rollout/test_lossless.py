"""A draft does not change the distribution of responses: compared with the exact one, and with an engine without draft.

The tests are shown to have enough power: they fail for an engine that accepts drafts too often, and for vLLM's CPU
sampling without our fixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from engine_process import EngineProcess
from exact import generate, sequence_p_value
from faulty_engines import LossyEngine, UnpatchedEngine
from tiny_models import LONG_PROMPT, PROMPT

from skyrl_spec.controller.lossless import two_sample_p_value
from skyrl_spec.doctor.exactness import NUM_RESPONSES, chi_square, sliced_sampling
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Generation

# A right engine fails one such test in a thousand. Seeds are fixed, so results do not vary from run to run.
LEVEL = 1e-3
CAUGHT = 1e-6
SAMPLING = SamplingConfig(temperature=0.7)
NUM_TOKENS = 4
LENIENCY = 0.5


@pytest.fixture(scope="module")
def lossy(start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    return start_engine(LossyEngine, (LENIENCY,))


@pytest.fixture(scope="module")
def plain(start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    return start_engine(speculative_config=None)


def test_responses_have_their_exact_joint_distribution(
    engine: EngineProcess, plain: EngineProcess, models_dir: Path
) -> None:
    for candidate in (engine, plain):
        assert sequence_p_value(candidate, models_dir / "w0", SAMPLING, NUM_TOKENS) > LEVEL


def test_dflash_responses_have_their_exact_joint_distribution(dflash_engine: EngineProcess, dflash_dir: Path) -> None:
    assert sequence_p_value(dflash_engine, dflash_dir / "t0", SAMPLING, NUM_TOKENS) > LEVEL


def test_a_lossy_sampler_and_an_unpatched_one_are_caught_by_it(
    lossy: EngineProcess, start_engine: Callable[..., EngineProcess], models_dir: Path
) -> None:
    for candidate in (lossy, start_engine(UnpatchedEngine)):
        assert sequence_p_value(candidate, models_dir / "w0", SAMPLING, NUM_TOKENS) < CAUGHT


def test_the_doctor_tells_a_lossy_sampler_from_a_good_one(
    engine: EngineProcess, plain: EngineProcess, lossy: EngineProcess
) -> None:
    def p_value(candidate: EngineProcess) -> float:
        (responses,) = generate(candidate, [PROMPT], sliced_sampling(2.0), n=NUM_RESPONSES, seed=4)
        value, num_bins = chi_square(responses)
        assert num_bins > 50
        return value

    assert min(p_value(engine), p_value(plain)) > LEVEL
    assert p_value(lossy) < CAUGHT


def test_the_canary_tells_a_lossy_sampler_from_a_good_one(
    engine: EngineProcess, plain: EngineProcess, lossy: EngineProcess
) -> None:
    # As in the losslessness canary of a run: a few prompts with dozens of responses each.
    def samples(candidate: EngineProcess, seed: int) -> Sequence[Generation]:
        sampling = SamplingConfig(max_generate_length=24)
        groups = generate(candidate, [PROMPT, [9], [60, 61, 62], LONG_PROMPT[:40]], sampling, n=128, seed=seed)
        return [generation for group in groups for generation in group]

    reference = samples(plain, seed=1)
    assert two_sample_p_value(samples(engine, seed=2), reference) > LEVEL
    assert two_sample_p_value(samples(lossy, seed=3), reference) < 1e-4
