"""vLLM's mixture of experts with a DFlash draft equals transformers and the reference, also after updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dflash_reference import DflashReference, TargetReference
from engine_process import EngineProcess
from exact import assert_exact_logprobs, generate
from recording import DflashRecorder, largest_difference
from safetensors.torch import load_file
from tiny_models import EXPERTS_PER_TOKEN, LONG_PROMPT, PROMPT, dflash, write_tiny_dflash, write_tiny_qwen3
from transformers import AutoModelForCausalLM
from updates import GREEDY, assert_equals_fresh, update

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.payload import pack_chunks
from skyrl_spec.types import Generation

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
        returns_experts=True,
        # Less than the longest prompt.
        engine_init_kwargs={"max_num_batched_tokens": 64},
        max_num_seqs=8,
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


def _assert_experts(generation: Generation, prompt: list[int], target: Path) -> None:
    """They are those of a forward pass by transformers, of all tokens but the last."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    token_ids = [*prompt, *generation.token_ids[:-1]]
    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), output_router_logits=True).router_logits
    expected = torch.stack([of_layer.topk(EXPERTS_PER_TOKEN, dim=-1).indices for of_layer in logits], dim=1)
    assert generation.experts is not None
    found = torch.from_numpy(generation.experts).long()
    assert torch.equal(found.sort(dim=-1).values, expected.sort(dim=-1).values)


def test_a_response_comes_with_the_experts_of_its_tokens(engine: EngineProcess, models: Path) -> None:
    sampling = SamplingConfig(max_generate_length=24)
    # The first takes the slots, the others find the prompt in the cache, and the last takes over what is free again.
    for prompt, n in ((LONG_PROMPT[:150], 1), (LONG_PROMPT[:150], 8), (PROMPT, 16), (LONG_PROMPT, 4)):
        before = engine.spec_counters()
        for generation in generate(engine, [prompt], sampling, n=n, seed=n)[0]:
            _assert_experts(generation, prompt, models / "t0")
        # Drafts were rejected, and their slots written again.
        assert (engine.spec_counters() - before).num_drafts > 0
