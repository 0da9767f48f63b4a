"""Engines that serve tiny models, each in a Ray actor: a process holds one vLLM engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle
from recording import DflashRecordingEngine
from tiny_models import MAX_MODEL_LEN, MTP, dflash, write_tiny_dflash, write_tiny_model, write_tiny_qwen3

from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine import EngineSettings


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``w0`` and ``w1`` (unlike weights), and ``tied0`` and ``tied1``."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        write_tiny_model(root / f"w{seed}", seed)
        write_tiny_model(root / f"tied{seed}", seed, tied=True)
    return root


@pytest.fixture(scope="session")
def dflash_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets ``t0`` and ``t1`` with DFlash drafts ``d0`` and ``d1`` (unlike weights)."""
    root = tmp_path_factory.mktemp("dflash_models")
    for index, seed in enumerate((1, 2)):
        write_tiny_dflash(root / f"d{index}", write_tiny_qwen3(root / f"t{index}", seed), seed)
    return root


@pytest.fixture(scope="session")
def base_settings(models_dir: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(models_dir / "w0"),
        dtype="fp32",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        speculative_config=MTP,
        weight_sync_backend="ray",
        enforce_eager=True,
        num_threads=1,
    )


@pytest.fixture(scope="session")
def start_engine(ray_cluster: None, base_settings: EngineSettings) -> Iterator[Callable[..., ActorHandle]]:
    """Starts an engine with changed settings, each in a process of its own."""
    actors = []

    def start(actor_class: Any = RolloutActor, args: tuple[Any, ...] = (), **changes: Any) -> ActorHandle:
        settings = replace(base_settings, **changes)
        actors.append(actor_class.options(**actor_options(settings)).remote(settings, *args))
        return actors[-1]

    yield start
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(scope="session")
def engine(start_engine: Callable[..., ActorHandle]) -> ActorHandle:
    """Serves ``w0`` with its MTP head; tests leave its weights as they are."""
    return start_engine()


@pytest.fixture(scope="session")
def dflash_engine(start_engine: Callable[..., ActorHandle], dflash_dir: Path) -> ActorHandle:
    """Serves ``t0`` with ``d0``; tests leave its weights as they are."""
    return start_engine(
        DflashRecordingEngine,
        model_path=str(dflash_dir / "t0"),
        speculative_config=dflash(dflash_dir / "d0"),
    )
