"""Faults of vLLM on CPU, on an engine without the fixes. If a test fails, its fix can be removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_process import EngineProcess
from exact import assert_exact_logprobs, exact_logprobs, generate, second_token_p_value
from faulty_engines import UnpatchedEngine
from safetensors.torch import load_file
from tiny_models import LONG_PROMPT, MAX_POSITIONS, PROMPT, split_weights, write_tiny_qwen3
from updates import GREEDY, update

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.payload import pack_weights


@pytest.fixture(scope="module")
def unpatched(start_engine: Callable[..., EngineProcess], models_dir: Path) -> EngineProcess:
    return start_engine(UnpatchedEngine, model_path=str(models_dir / "tied0"), max_model_len=MAX_POSITIONS)


@pytest.fixture(scope="module")
def patched(start_engine: Callable[..., EngineProcess], models_dir: Path) -> EngineProcess:
    return start_engine(model_path=str(models_dir / "tied0"), max_model_len=MAX_POSITIONS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_is_wrong_without_the_fix(
    unpatched: EngineProcess, patched: EngineProcess, models_dir: Path, temperature: float
) -> None:
    sampling = SamplingConfig(temperature=temperature)
    assert second_token_p_value(unpatched, models_dir / "tied0", sampling) < 1e-6
    assert second_token_p_value(patched, models_dir / "tied0", sampling) > 0.001


def test_tied_output_weights_stay_old_without_the_fix(
    unpatched: EngineProcess, patched: EngineProcess, models_dir: Path
) -> None:
    target, _ = split_weights(models_dir / "tied1")
    one_token = SamplingConfig(max_generate_length=1)
    errors = []
    for engine in (unpatched, patched):
        engine.init_weight_transfer_engine({})
        engine.start_weight_update(False)
        engine.update_weights(pack_weights(target.items()))
        engine.finish_weight_update()
        (sample,) = generate(engine, [PROMPT], one_token)[0]
        exact = exact_logprobs(models_dir / "tied1", [PROMPT], one_token)[0, -1, sample.token_ids[0]]
        errors.append(abs(float(exact) - sample.logprobs[0]))
    assert errors[0] > 0.01
    assert errors[1] < 1e-4


def test_updated_experts_are_wrong_without_the_fix(start_engine: Callable[..., EngineProcess], tmp_path: Path) -> None:
    # The fixed engine is tested in test_mixtures.py.
    old, new = (write_tiny_qwen3(tmp_path / name, seed, has_experts=True) for seed, name in enumerate(("old", "new")))
    engine = start_engine(UnpatchedEngine, model_path=str(old), speculative_config=None)
    engine.init_weight_transfer_engine({})
    update(engine, False, [pack_weights(load_file(new / "model.safetensors").items())])
    with pytest.raises(AssertionError):
        assert_exact_logprobs(generate(engine, [PROMPT], GREEDY)[0], PROMPT, new, GREEDY)


def test_top_k_where_the_model_has_no_positions_left_to_draft_in(patched: EngineProcess) -> None:
    prompt = (LONG_PROMPT * 2)[: MAX_POSITIONS - 6]
    assert len(generate(patched, [prompt], SamplingConfig(top_k=8, max_generate_length=6), n=4)[0]) == 4


def test_a_prompt_in_parts_fails_without_the_fix(
    start_engine: Callable[..., EngineProcess], patched: EngineProcess, models_dir: Path
) -> None:
    sampling = SamplingConfig(max_generate_length=8)
    settings = {
        "model_path": str(models_dir / "tied0"),
        "max_model_len": MAX_POSITIONS,
        "max_num_seqs": 4,
        # Less than half of the prompt.
        "engine_init_kwargs": {"max_num_batched_tokens": 128},
    }
    with pytest.raises(RuntimeError, match="does not use offset"):
        generate(start_engine(UnpatchedEngine, **settings), [LONG_PROMPT], sampling, seed=3)
    whole, in_parts = (
        generate(engine, [LONG_PROMPT], sampling, n=2, seed=3) for engine in (patched, start_engine(**settings))
    )
    assert [g.token_ids for g in in_parts[0]] == [g.token_ids for g in whole[0]]
