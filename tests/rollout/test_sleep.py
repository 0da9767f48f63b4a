"""Sleep of engines: what is lost, what must come back, in which order, and what each mistake does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess
from exact import generate
from sleeping_engine import SleepingEngine
from tiny_models import MTP, dflash, split_weights
from updates import GREEDY, PROMPTS, run, update

from skyrl_spec.rollout.engine_settings import EngineSettings, engine_args
from skyrl_spec.rollout.sleep import Sleep
from skyrl_spec.sync.payload import pack_weights
from skyrl_spec.types import Generation, SpecCounters


def _lacks(*components: str) -> str:
    return f"the engine slept at level 2, which drops weights, and no sync has brought its {' and '.join(components)}"


@pytest.fixture(scope="module", params=["mtp", "mtp tied", "dflash"])
def weights(request: pytest.FixtureRequest, models_dir: Path, dflash_dir: Path) -> dict[str, Any]:
    """Settings of an engine, and the weights of its policy and its draft."""
    if request.param == "dflash":
        model, draft = dflash_dir / "t0", dflash_dir / "d0"
        changes = {"model_path": str(model), "speculative_config": dflash(draft)}
        return changes | {"parts": (split_weights(model)[0], split_weights(draft)[0])}
    model = models_dir / ("tied0" if "tied" in request.param else "w0")
    return {"model_path": str(model), "speculative_config": MTP, "parts": split_weights(model)}


@pytest.fixture(scope="module")
def sleeper(start_engine: Callable[..., EngineProcess], weights: dict[str, Any]) -> Iterator[EngineProcess]:
    settings = {name: value for name, value in weights.items() if name != "parts"}
    engine = start_engine(SleepingEngine, synced=("policy", "draft"), **settings)
    engine.init_weight_transfer_engine({})
    yield engine
    engine.end()


def _sync(engine: EngineProcess, weights: dict[str, Any], *, draft: bool = True) -> None:
    for is_draft in (False, True)[: 1 + draft]:
        update(engine, is_draft, [pack_weights(weights["parts"][is_draft].items())])
    engine.reset_prefix_cache()


def _tokens(result: tuple[list[Generation], SpecCounters]) -> list[list[int]]:
    return [generation.token_ids for generation in result[0]]


def test_it_samples_as_before_after_each_level(sleeper: EngineProcess, weights: dict[str, Any]) -> None:
    _sync(sleeper, weights)
    before = run(sleeper)
    for level in (1, 2, 1):
        sleeper.sleep(level)
        sleeper.wake_weights()
        if level == 2:
            _sync(sleeper, weights)
        sleeper.wake_keys()
        assert run(sleeper) == before


def test_what_sleeps_is_not_used(sleeper: EngineProcess, weights: dict[str, Any]) -> None:
    sleeper.sleep(1)
    for call in (lambda: generate(sleeper, PROMPTS, GREEDY), lambda: sleeper.propose(PROMPTS, GREEDY, 0)):
        with pytest.raises(RuntimeError, match="the engine sleeps: wake its weights and keys first"):
            call()
    with pytest.raises(RuntimeError, match="weights are sent to an engine that sleeps"):
        _sync(sleeper, weights)
    with pytest.raises(RuntimeError, match="keys are told to wake before its weights"):
        sleeper.wake_keys()
    with pytest.raises(RuntimeError, match="told to sleep, but it sleeps already"):
        sleeper.sleep(2)
    sleeper.wake_weights()
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        generate(sleeper, PROMPTS, GREEDY)
    sleeper.wake_keys()
    assert run(sleeper)[1].num_draft_tokens > 0


def test_a_draft_that_no_sync_brings_back_is_named(sleeper: EngineProcess, weights: dict[str, Any]) -> None:
    _sync(sleeper, weights)
    before = run(sleeper)
    sleeper.sleep(2)
    sleeper.wake_weights()
    with pytest.raises(RuntimeError, match=_lacks("draft", "policy")):
        sleeper.wake_keys()
    _sync(sleeper, weights, draft=False)
    with pytest.raises(RuntimeError, match=_lacks("draft")):
        sleeper.wake_keys()
    # What the check is for. Without it the responses are right, and only the acceptance tells.
    sleeper.forget_that_it_lacks("draft")
    sleeper.wake_keys()
    after = run(sleeper)
    assert _tokens(after) == _tokens(before)
    assert after[1].num_accepted_tokens < 0.2 * before[1].num_accepted_tokens
    # A sync brings it back.
    _sync(sleeper, weights)
    assert run(sleeper) == before


def test_vllm_is_told_what_sleeps(base_settings: EngineSettings) -> None:
    assert "enable_sleep_mode" not in engine_args(base_settings)
    on_gpu = replace(base_settings, device="cuda")
    for level in (0, 1, 2):
        args = engine_args(replace(on_gpu, sleep_level=level, synced=("policy", "draft")))
        assert args["enable_sleep_mode"] == (level > 0)


def test_there_are_two_levels() -> None:
    for level in (0, 3):
        with pytest.raises(ValueError, match=f"no such level of sleep: {level}"):
            Sleep(("policy",)).falls_asleep(level)
