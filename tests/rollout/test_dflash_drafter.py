"""vLLM's DFlash drafter equals the reference, also for prompts in chunks and cached prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dflash_reference import DflashReference, TargetReference
from engine_process import EngineProcess
from recording import DflashRecorder, DraftedResponse, largest_difference
from tiny_models import BLOCK_SIZE, LONG_PROMPT, VOCAB_SIZE, dflash, write_tiny_dflash, write_tiny_qwen3

# Two implementations in fp32.
TOLERANCE = 1e-4
PROMPT_LENGTHS = (1, 2, 7, 40)
RESPONSE_LENGTH = 24
NUM_LAYERS = 6


@pytest.fixture(scope="module", params=["default layers", "first and last layer, prompts in chunks"])
def served(
    request: pytest.FixtureRequest, start_engine: Callable[..., EngineProcess], tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineProcess, Path, Path]:
    """(engine, target, draft)"""
    if request.param == "default layers":
        models = request.getfixturevalue("dflash_dir")
        return request.getfixturevalue("dflash_engine"), models / "t0", models / "d0"
    root = tmp_path_factory.mktemp("dflash")
    target = write_tiny_qwen3(root / "target", seed=0, tied=True, num_layers=NUM_LAYERS)
    # The last layer is included: its output must be captured before the final norm.
    draft = write_tiny_dflash(root / "draft", target, seed=0, target_layer_ids=(0, NUM_LAYERS - 1))
    engine = start_engine(
        DflashRecorder,
        model_path=str(target),
        speculative_config=dflash(draft),
        max_num_seqs=8,
        engine_init_kwargs={"max_num_batched_tokens": 64},
    )
    return engine, target, draft


@pytest.fixture(scope="module")
def responses(served: tuple[EngineProcess, Path, Path]) -> list[DraftedResponse]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return [served[0].draft(prompt, RESPONSE_LENGTH) for prompt in [*prompts, LONG_PROMPT[:150]]]


def test_the_drafter_computes_the_reference(
    served: tuple[EngineProcess, Path, Path], responses: list[DraftedResponse]
) -> None:
    _, target, draft = served
    blocks = [block for response in responses for block in response.blocks]
    assert {block.logits.shape for block in blocks} == {(BLOCK_SIZE - 1, VOCAB_SIZE)}
    assert all(len(response.blocks) > 5 for response in responses)
    assert largest_difference(responses, TargetReference(target), DflashReference(draft)) < TOLERANCE


def test_a_block_starts_behind_the_accepted_drafts(dflash_engine: EngineProcess) -> None:
    num_accepted = []
    for prompt in ([9], LONG_PROMPT[:7]):
        response = dflash_engine.draft(prompt, RESPONSE_LENGTH)
        assert response.blocks[0].anchor == len(prompt)
        for block, following in itertools.pairwise(response.blocks):
            drafts = block.logits.argmax(-1).tolist()
            sampled = response.token_ids[block.anchor + 1 :]
            accepted = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(drafts, sampled, strict=False)))
            assert following.anchor == block.anchor + len(accepted) + 1
            num_accepted.append(len(accepted))
    assert min(num_accepted) == 0 < max(num_accepted)


@pytest.mark.parametrize("offset", [-1, 1])
def test_captured_layers_off_by_one_are_another_function(
    served: tuple[EngineProcess, Path, Path], responses: list[DraftedResponse], offset: int
) -> None:
    _, target, path = served
    draft = DflashReference(path)
    draft.target_layer_ids = [(layer_id + offset) % NUM_LAYERS for layer_id in draft.target_layer_ids]
    assert largest_difference(responses, TargetReference(target), draft) > 1e-2


def test_a_cached_prefix_has_the_keys_of_the_draft(served: tuple[EngineProcess, Path, Path]) -> None:
    engine, target, draft = served
    engine.reset_prefix_cache()
    prompt = LONG_PROMPT[::-1]
    # The second prompt has its own tokens after the cached prefix.
    requests = [(prompt, 8), ([*prompt[:280], 5, 6, 7], 8)]
    before = engine.num_cached_tokens()
    responses = [engine.draft(*request) for request in requests]
    assert engine.num_cached_tokens() - before >= 128
    assert largest_difference(responses, TargetReference(target), DflashReference(draft)) < TOLERANCE
