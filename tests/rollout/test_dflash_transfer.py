"""An engine with updated DFlash draft, target, or both equals one built from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dflash_reference import DflashReference, TargetReference
from engine_process import EngineProcess
from exact import assert_exact_logprobs, generate
from recording import DflashRecorder, DraftedResponse, largest_difference
from safetensors.torch import load_file
from tiny_models import LONG_PROMPT, PROMPT, dflash
from torch import Tensor
from updates import GREEDY, assert_equals_fresh, run, update

from skyrl_spec.sync.payload import pack_chunks, pack_weights

PROMPTS = [PROMPT, [9], LONG_PROMPT[:200]]


@pytest.fixture(scope="module")
def updated(dflash_engine: EngineProcess, dflash_dir: Path) -> Iterator[EngineProcess]:
    """The engine built from ``t0`` and ``d0``, which gets these back at the end."""
    dflash_engine.init_weight_transfer_engine({})
    yield dflash_engine
    update_both(dflash_engine, dflash_dir, 0)


@pytest.fixture(scope="module")
def fresh(start_engine: Callable[..., EngineProcess], dflash_dir: Path) -> EngineProcess:
    return start_engine(DflashRecorder, model_path=str(dflash_dir / "t1"), speculative_config=dflash(dflash_dir / "d1"))


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def update_one(engine: EngineProcess, path: Path, draft: bool, max_bytes: int = 2**30, backwards: bool = False) -> None:
    named_tensors = sorted(weights_of(path).items(), reverse=backwards)
    update(engine, draft, pack_chunks(named_tensors, max_bytes))
    engine.reset_prefix_cache()


def update_both(engine: EngineProcess, models: Path, seed: int) -> None:
    update_one(engine, models / f"t{seed}", draft=False)
    update_one(engine, models / f"d{seed}", draft=True)


def draft_responses(engine: EngineProcess) -> list[DraftedResponse]:
    return [engine.draft(prompt, 12) for prompt in PROMPTS]


def assert_same_engine(engine: EngineProcess, fresh: EngineProcess) -> None:
    """Asserts that tokens, acceptance, log-probs and the drafter's logits are equal bit for bit."""
    assert_equals_fresh(engine, fresh)
    for response, expected in zip(draft_responses(engine), draft_responses(fresh), strict=True):
        assert response.token_ids == expected.token_ids
        for block, expected_block in zip(response.blocks, expected.blocks, strict=True):
            assert torch.equal(block.logits, expected_block.logits)


def test_updated_engine_equals_a_fresh_one(updated: EngineProcess, fresh: EngineProcess, dflash_dir: Path) -> None:
    old_logits = draft_responses(updated)[0].blocks[0].logits
    buffers = updated.context_buffers()
    assert {device for device, _ in buffers.values()} == {"cpu"}
    # Repeated, because an update starts from the state that the last one left.
    for _ in range(2):
        update_both(updated, dflash_dir, 1)
        assert_same_engine(updated, fresh)
        update_both(updated, dflash_dir, 0)
        assert torch.equal(draft_responses(updated)[0].blocks[0].logits, old_logits)
    # New values at the old addresses, because CUDA graphs keep addresses.
    assert updated.context_buffers() == buffers
    assert updated.shares_embeddings_and_head()


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_chunked_update_equals_a_single_one(
    updated: EngineProcess, fresh: EngineProcess, dflash_dir: Path, backwards: bool
) -> None:
    update_both(updated, dflash_dir, 0)
    # Nearly one tensor per chunk.
    update_one(updated, dflash_dir / "d1", draft=True, max_bytes=10_000, backwards=backwards)
    update_one(updated, dflash_dir / "t1", draft=False, max_bytes=10_000, backwards=backwards)
    assert_same_engine(updated, fresh)


def test_draft_update_alone_leaves_the_target_as_it_is(updated: EngineProcess, dflash_dir: Path) -> None:
    update_both(updated, dflash_dir, 0)
    before, _ = run(updated)
    update_one(updated, dflash_dir / "d1", draft=True)
    after, _ = run(updated)
    assert [sample.token_ids for sample in after] == [sample.token_ids for sample in before]
    assert_exact_logprobs(generate(updated, [PROMPT], GREEDY)[0], PROMPT, dflash_dir / "t0", GREEDY)
    assert updated.shares_embeddings_and_head()
    target, draft = TargetReference(dflash_dir / "t0"), DflashReference(dflash_dir / "d1")
    assert largest_difference(draft_responses(updated), target, draft) < 1e-4


def test_target_update_alone_gives_the_draft_new_embeddings_and_head(updated: EngineProcess, dflash_dir: Path) -> None:
    update_both(updated, dflash_dir, 0)
    update_one(updated, dflash_dir / "t1", draft=False)
    responses, draft = draft_responses(updated), DflashReference(dflash_dir / "d0")
    assert largest_difference(responses, TargetReference(dflash_dir / "t1"), draft) < 1e-4
    assert largest_difference(responses, TargetReference(dflash_dir / "t0"), draft) > 1e-2


def test_bad_updates_name_the_tensor(updated: EngineProcess, fresh: EngineProcess, dflash_dir: Path) -> None:
    weights, of_target = weights_of(dflash_dir / "d1"), weights_of(dflash_dir / "t1")
    name = "layers.1.self_attn.k_proj.weight"

    def refuse(match: str, *named_tensors: tuple[str, Tensor]) -> None:
        updated.start_weight_update(True)
        with pytest.raises(ValueError, match=match):
            updated.update_weights(pack_weights(named_tensors))

    embeddings = of_target["model.embed_tokens.weight"]
    for foreign in ("nonsense", "model.embed_tokens.weight", "embed_tokens.weight", "lm_head.weight"):
        refuse(f"{foreign}: not a tensor of the draft", (foreign, embeddings))
    refuse(rf"{name}: shape \[128, 64\], but the draft .* has \[64, 64\]", (name, weights[name].repeat(2, 1)))
    refuse(f"{name}: sent twice", (name, weights[name]), (name, weights[name]))

    updated.start_weight_update(True)
    updated.update_weights(pack_weights((key, weights[key]) for key in weights if key != name))
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the draft .*: {name}"):
        updated.finish_weight_update()
    # The missing tensor can still be sent.
    updated.update_weights(pack_weights([(name, weights[name])]))
    updated.finish_weight_update()
    update_one(updated, dflash_dir / "t1", draft=False)
    assert_same_engine(updated, fresh)
