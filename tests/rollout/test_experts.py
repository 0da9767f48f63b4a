"""vLLM's mixture of experts with a DFlash draft equals transformers and the reference, also after updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dflash_reference import DflashReference, TargetReference
from engine_process import EngineProcess
from exact import assert_exact_logprobs, generate
from recording import DflashRecorder, largest_difference
from safetensors.torch import load_file
from tiny_models import LONG_PROMPT, PROMPT, dflash, write_tiny_dflash, write_tiny_qwen3
from updates import GREEDY, assert_equals_fresh, update

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.payload import pack_chunks

# Two implementations in fp32.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtures ``t0`` and ``t1`` with DFlash drafts ``d0`` and ``d1``."""
    root = tmp_path_factory.mktemp("mixtures")
    for seed in (0, 1):
        write_tiny_dflash(root / f"d{seed}", write_tiny_qwen3(root / f"t{seed}", seed, has_experts=True), seed)
    return root


@pytest.fixture(scope="module")
def start(start_engine: Callable[..., EngineProcess], models: Path) -> Callable[[int], EngineProcess]:
    return lambda seed: start_engine(
        DflashRecorder,
        model_path=str(models / f"t{seed}"),
        speculative_config=dflash(models / f"d{seed}"),
    )


@pytest.fixture(scope="module")
def engine(start: Callable[[int], EngineProcess]) -> EngineProcess:
    return start(0)


def _assert_is(engine: EngineProcess, models: Path, seed: int) -> None:
    target, draft = models / f"t{seed}", models / f"d{seed}"
    sampling = SamplingConfig(max_generate_length=24)
    for prompt in (PROMPT, LONG_PROMPT[:150]):
        assert_exact_logprobs(generate(engine, [prompt], sampling, n=4, seed=0)[0], prompt, target, sampling)
        assert_exact_logprobs(generate(engine, [prompt], GREEDY)[0], prompt, target, GREEDY)
    responses = [engine.draft(prompt, 24) for prompt in (PROMPT, [9], LONG_PROMPT[:150])]
    assert largest_difference(responses, TargetReference(target), DflashReference(draft)) < TOLERANCE


def test_samples_and_drafts_are_exact_before_and_after_updates(
    engine: EngineProcess, start: Callable[[int], EngineProcess], models: Path
) -> None:
    _assert_is(engine, models, 0)
    engine.init_weight_transfer_engine({})
    # Repeated, because an update starts from the state that the last one left.
    for seed in (1, 0, 1):
        for name, is_draft in ((f"t{seed}", False), (f"d{seed}", True)):
            weights = load_file(models / name / "model.safetensors")
            # In reverse order, and with the tensors of an expert in different chunks.
            update(engine, is_draft, pack_chunks(reversed(weights.items()), max_bytes=20_000))
        engine.reset_prefix_cache()
        _assert_is(engine, models, seed)
    assert_equals_fresh(engine, start(1))


def test_a_missing_expert_is_named(engine: EngineProcess, models: Path) -> None:
    weights = load_file(models / "t0" / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    missing = weights.pop(name)
    engine.start_weight_update(False)
    for chunk in pack_chunks(weights.items(), max_bytes=2**30):
        engine.update_weights(chunk)
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the target .*: {name}"):
        engine.finish_weight_update()
    for chunk in pack_chunks([(name, missing)], max_bytes=2**30):
        engine.update_weights(chunk)
    engine.finish_weight_update()
    engine.reset_prefix_cache()
    sampling = SamplingConfig(max_generate_length=8)
    assert_exact_logprobs(generate(engine, [PROMPT], sampling, seed=0)[0], PROMPT, models / "t0", sampling)
