"""Faults of vLLM with DFlash drafts, on engines without the fixes. If a test fails, its fix can be removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dflash_reference import DflashReference, TargetReference
from engine_process import EngineProcess
from recording import DflashRecorder, largest_difference
from safetensors.torch import load_file
from tiny_models import PROMPT, dflash
from updates import update

from skyrl_spec.rollout import vllm_patches
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.sync.payload import pack_weights

# The causes: a product with emptied weights, and a RoPE table on the meta device.
ERRORS = {
    "fix_context_projection_of_packed_weights": "mat1 and mat2|size|dimension",
    "fix_reload_of_context_buffers": "Meta tensors",
}


class EngineWithout(DflashRecorder):
    """An engine on vLLM with some fixes left out."""

    def __init__(self, settings: EngineSettings, *left_out: str):
        every = {fix.__name__: fix for fix in (*vllm_patches.FIXES, *vllm_patches.CPU_FIXES)}
        for name in left_out:
            del every[name]
        vllm_patches.register(fixes=(), cpu_fixes=tuple(every.values()))
        super().__init__(settings)


@pytest.fixture(scope="module")
def engines_without(start_engine: Callable[..., EngineProcess], dflash_dir: Path) -> dict[str, EngineProcess]:
    """Engines by the fix that they lack. Two independent faults share an engine."""

    def start(*left_out: str) -> EngineProcess:
        settings = {"model_path": str(dflash_dir / "t0"), "speculative_config": dflash(dflash_dir / "d0")}
        return start_engine(EngineWithout, args=left_out, **settings)

    packed, keys, buffers = (
        "fix_context_projection_of_packed_weights",
        "fix_context_keys_of_later_layers",
        "fix_reload_of_context_buffers",
    )
    both = start(keys, buffers)
    return {packed: start(packed), keys: both, buffers: both}


def test_context_keys_are_wrong_without_the_fix(
    engines_without: dict[str, EngineProcess], dflash_engine: EngineProcess, dflash_dir: Path
) -> None:
    target, draft = TargetReference(dflash_dir / "t0"), DflashReference(dflash_dir / "d0")
    unpatched = engines_without["fix_context_keys_of_later_layers"].draft(PROMPT, 4)
    assert largest_difference([unpatched], target, draft) > 1e-2
    patched = dflash_engine.draft(PROMPT, 4)
    assert largest_difference([patched], target, draft) < 1e-4


@pytest.mark.parametrize("fix", ERRORS)
def test_an_update_breaks_the_draft_without_the_fix(
    engines_without: dict[str, EngineProcess], dflash_dir: Path, fix: str
) -> None:
    """The update changes no weight, and still breaks the draft. Must run last: the engine cannot be used afterwards."""
    unpatched = engines_without[fix]
    unpatched.init_weight_transfer_engine({})
    assert unpatched.draft(PROMPT, 4).blocks
    update(unpatched, True, [pack_weights(load_file(dflash_dir / "d0" / "model.safetensors").items())])
    with pytest.raises(RuntimeError, match=ERRORS[fix]):
        unpatched.draft(PROMPT, 4)
