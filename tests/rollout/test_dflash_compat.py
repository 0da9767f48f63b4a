"""The faults of vLLM with DFlash drafts that are mended, on engines without: when one is gone, so can its mend."""

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
from skyrl_spec.rollout.engine import EngineSettings
from skyrl_spec.sync.payload import pack_weights

# Multiplying with the emptied weights, and rotating with a table on the meta device.
ERRORS = {
    "mend_context_projection_of_packed_weights": "mat1 and mat2|size|dimension",
    "mend_reload_of_context_buffers": "Meta tensors",
}


class EngineWithout(DflashRecorder):
    """An engine on vLLM with some mends left out."""

    def __init__(self, settings: EngineSettings, *left_out: str):
        every = {mend.__name__: mend for mend in (*vllm_patches.MENDS, *vllm_patches.CPU_MENDS)}
        for name in left_out:
            del every[name]
        vllm_patches.register(mends=(), cpu_mends=tuple(every.values()))
        super().__init__(settings)


@pytest.fixture(scope="module")
def engines_without(start_engine: Callable[..., EngineProcess], dflash_dir: Path) -> dict[str, EngineProcess]:
    """By the mend that is left out; two faults that have nothing to do with each other share an engine."""

    def start(*left_out: str) -> EngineProcess:
        settings = {"model_path": str(dflash_dir / "t0"), "speculative_config": dflash(dflash_dir / "d0")}
        return start_engine(EngineWithout, args=left_out, **settings)

    packed, keys, buffers = (
        "mend_context_projection_of_packed_weights",
        "mend_context_keys_of_later_layers",
        "mend_reload_of_context_buffers",
    )
    both = start(keys, buffers)
    return {packed: start(packed), keys: both, buffers: both}


def test_context_keys_are_wrong_without_the_mend(
    engines_without: dict[str, EngineProcess], dflash_engine: EngineProcess, dflash_dir: Path
) -> None:
    target, draft = TargetReference(dflash_dir / "t0"), DflashReference(dflash_dir / "d0")
    unmended = engines_without["mend_context_keys_of_later_layers"].draft(PROMPT, 4)
    assert largest_difference([unmended], target, draft) > 1e-2
    mended = dflash_engine.draft(PROMPT, 4)
    assert largest_difference([mended], target, draft) < 1e-4


@pytest.mark.parametrize("mend", ERRORS)
def test_an_update_breaks_the_draft_without_the_mend(
    engines_without: dict[str, EngineProcess], dflash_dir: Path, mend: str
) -> None:
    """Every weight stays what it is, and yet; test_dflash_transfer.py has the same with the mends. Last: it breaks."""
    unmended = engines_without[mend]
    unmended.init_weight_transfer_engine({})
    assert unmended.draft(PROMPT, 4).blocks
    update(unmended, True, [pack_weights(load_file(dflash_dir / "d0" / "model.safetensors").items())])
    with pytest.raises(RuntimeError, match=ERRORS[mend]):
        unmended.draft(PROMPT, 4)
