"""vLLM's DFlash drafter computes what the reference says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from dflash_reference import DflashReference, TargetReference
from ray.actor import ActorHandle
from recording import DflashRecordingEngine, DraftedResponse, reference_logits
from tiny_models import BLOCK_SIZE, LONG_PROMPT, VOCAB_SIZE, dflash, write_tiny_dflash, write_tiny_qwen3

# fp32 on two implementations.
TOLERANCE = 1e-4
PROMPT_LENGTHS = (1, 2, 7, 40)
RESPONSE_LENGTH = 24
# The default rule's, and the first and the last layer: the last one's output is taken before the final norm.
LAYER_IDS = {"default layers": None, "first and last layer": (0, 5)}


@pytest.fixture(scope="module", params=LAYER_IDS.values(), ids=LAYER_IDS.keys())
def served(
    request: pytest.FixtureRequest, start_engine: Callable[..., ActorHandle], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ActorHandle, Path, Path]:
    """(engine, target, draft)"""
    root = tmp_path_factory.mktemp("dflash")
    tied = request.param is not None
    target = write_tiny_qwen3(root / "target", seed=0, tied=tied)
    draft = write_tiny_dflash(root / "draft", target, seed=0, target_layer_ids=request.param)
    engine = start_engine(DflashRecordingEngine, model_path=str(target), speculative_config=dflash(draft))
    return engine, target, draft


@pytest.fixture(scope="module")
def responses(served: tuple[ActorHandle, Path, Path]) -> list[DraftedResponse]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return ray.get([served[0].draft.remote(prompt, RESPONSE_LENGTH) for prompt in [*prompts, LONG_PROMPT[:150]]])


def _largest_difference(responses: list[DraftedResponse], target: Path, draft: DflashReference) -> float:
    of_target = TargetReference(target)
    return max(
        float((block.logits - reference_logits(draft, of_target, response.token_ids, block)).abs().max())
        for response in responses
        for block in response.blocks
    )


def test_the_drafter_computes_the_reference(
    served: tuple[ActorHandle, Path, Path], responses: list[DraftedResponse]
) -> None:
    _, target, draft = served
    blocks = [block for response in responses for block in response.blocks]
    assert {block.logits.shape for block in blocks} == {(BLOCK_SIZE - 1, VOCAB_SIZE)}
    # Later blocks, also behind accepted drafts.
    assert all(len(response.blocks) > 5 for response in responses)
    steps = [b.anchor - a.anchor for response in responses for a, b in itertools.pairwise(response.blocks)]
    assert min(steps) == 1 < max(steps)
    assert _largest_difference(responses, target, DflashReference(draft)) < TOLERANCE


@pytest.mark.parametrize("offset", [-1, 1])
def test_captured_layers_off_by_one_are_another_function(
    served: tuple[ActorHandle, Path, Path], responses: list[DraftedResponse], offset: int
) -> None:
    _, target, path = served
    draft = DflashReference(path)
    draft.target_layer_ids = [(layer_id + offset) % 6 for layer_id in draft.target_layer_ids]
    assert _largest_difference(responses, target, draft) > 1e-2
