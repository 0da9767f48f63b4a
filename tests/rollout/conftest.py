"""Engines that serve tiny models, without Ray. tests/e2e and test_ipc_sync run engines in Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess
from recording import DflashRecorder
from tiny_models import MAX_MODEL_LEN, MTP, dflash, write_tiny_dflash, write_tiny_model, write_tiny_qwen3

from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``w0`` and ``w1`` with different weights, and ``tied0`` and ``tied1`` with tied embeddings."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        write_tiny_model(root / f"w{seed}", seed)
        write_tiny_model(root / f"tied{seed}", seed, tied=True)
    return root


@pytest.fixture(scope="session")
def dflash_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets ``t0`` and ``t1`` with DFlash drafts ``d0`` and ``d1``, all with different weights."""
    root = tmp_path_factory.mktemp("dflash_models")
    for index, seed in enumerate((1, 2)):
        write_tiny_dflash(root / f"d{index}", write_tiny_qwen3(root / f"t{index}", seed), seed)
    return root


@pytest.fixture(scope="module", params=["mtp", "dflash"])
def kind(request: pytest.FixtureRequest) -> str:
    """Runs a test with each kind of draft."""
    return request.param


@pytest.fixture(scope="module")
def target(kind: str, models_dir: Path, dflash_dir: Path) -> Path:
    """The model of a draft of this kind."""
    return models_dir / "w0" if kind == "mtp" else dflash_dir / "t0"


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
        cpu_kvcache_space=0.125,
    )


StartEngine = Callable[..., EngineProcess]


@contextmanager
def engines_from(base_settings: EngineSettings) -> Iterator[StartEngine]:
    """A function that starts engines with changed settings. All end with the context: each takes most of a GiB."""
    started: list[EngineProcess] = []

    def start(
        engine_class: type[RolloutEngine] = RolloutEngine, args: tuple[Any, ...] = (), **changes: Any
    ) -> EngineProcess:
        started.append(EngineProcess(engine_class, replace(base_settings, **changes), *args))
        return started[-1]

    try:
        yield start
    finally:
        for engine in started:
            engine.end()


@pytest.fixture(scope="module")
def start_engine(base_settings: EngineSettings) -> Iterator[StartEngine]:
    """A function that starts an engine with changed settings, which ends with the test module."""
    with engines_from(base_settings) as start:
        yield start


@pytest.fixture(scope="session")
def engine(base_settings: EngineSettings) -> Iterator[EngineProcess]:
    """An engine with ``w0`` and its MTP head. Tests must restore its weights."""
    with engines_from(base_settings) as start:
        yield start()


@pytest.fixture(scope="session")
def dflash_engine(base_settings: EngineSettings, dflash_dir: Path) -> Iterator[EngineProcess]:
    """An engine with ``t0`` and ``d0``. Tests must restore its weights."""
    models = {"model_path": str(dflash_dir / "t0"), "speculative_config": dflash(dflash_dir / "d0")}
    with engines_from(base_settings) as start:
        yield start(DflashRecorder, **models)
