"""An exported DFlash draft is served by its own directory: vLLM finds policy and method in its config.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from engine_process import EngineProcess
from exact import generate
from tiny_models import PROMPT

from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.draft import DflashConfig
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.specs.dflash import exported_dflash_config, read_dflash_spec


class ServedHere(RolloutEngine):
    """An engine that is started in a folder."""

    def __init__(self, settings: EngineSettings, folder: Path):
        os.chdir(folder)
        super().__init__(settings)


def test_a_draft_is_served_without_further_settings(
    tmp_path: Path, dflash_dir: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    shutil.copytree(dflash_dir / "t0", tmp_path / "model")
    shutil.copytree(dflash_dir / "d0", tmp_path / "draft")
    config = exported_dflash_config(
        read_dflash_spec(str(dflash_dir / "d0")), "float32", DflashConfig(num_speculative_tokens=3)
    )
    (tmp_path / "draft" / "config.json").write_text(json.dumps(config))
    sampling = SamplingConfig(temperature=0.0, max_generate_length=40)
    served = start_engine(ServedHere, (tmp_path,), model_path="./draft", speculative_config=None)
    named = start_engine(
        model_path=str(dflash_dir / "t0"),
        speculative_config={"method": "dflash", "model": str(dflash_dir / "d0"), "num_speculative_tokens": 3},
    )
    responses, counters = [], []
    for engine in (served, named):
        responses.append([group[0].token_ids for group in generate(engine, [PROMPT, [9]], sampling)])
        counters.append(engine.spec_counters())
    assert responses[0] == responses[1]
    assert counters[0] == counters[1]
    assert counters[0].num_draft_tokens > 20
