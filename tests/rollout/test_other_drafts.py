"""Drafts that are evaluated but not trained: EAGLE-3 and n-gram, as ``eval-draft`` asks vLLM for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_process import EngineProcess
from tiny_models import LONG_PROMPT, PROMPT, write_tiny_eagle3, write_tiny_qwen3

from skyrl_spec.evaluation.target import open_target
from skyrl_spec.settings.options import EvalDraftOptions
from skyrl_spec.settings.schema import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, max_generate_length=40)
# Repeats itself, so that an n-gram draft has something to find.
REPEATING = [3, 4, 5, 6, 7, 8] * 4


@pytest.mark.parametrize("method", ["eagle3", "ngram"])
def test_drafts_without_training_change_nothing(
    method: str, start_engine: Callable[..., EngineProcess], tmp_path: Path
) -> None:
    # EAGLE-3 sees layers 2, L/2 and L-3, which must not fall together.
    model = write_tiny_qwen3(tmp_path / "target", seed=1, num_layers=8)
    draft = str(write_tiny_eagle3(tmp_path / "draft", model, seed=0)) if method == "eagle3" else None
    with open_target(EvalDraftOptions(target=str(model), method=method, draft=draft)) as target:
        speculative = target.speculative_config(3)
    plain = start_engine(model_path=str(model), speculative_config=None)
    drafted = start_engine(model_path=str(model), speculative_config=speculative)
    prompts = [PROMPT, REPEATING, LONG_PROMPT[:60]]
    mine, theirs = (engine.generate(prompts, GREEDY, 1, 0) for engine in (drafted, plain))
    assert [group[0].token_ids for group in mine] == [group[0].token_ids for group in theirs]
    counters = drafted.spec_counters()
    assert counters.num_drafts > 0
    assert len(counters.num_accepted_tokens_per_pos) == 3
