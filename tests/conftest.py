"""Shared by all tests: one local Ray, how the processes of tests start, which tests share a worker."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SHARED = (
    "tests/dist",
    "tests/megatron",
    "tests/rollout",
    "tests/e2e",
    "tests/fidelity",
    "tests/gpu",
    "benchmarks",
    "examples/arithmetic_mtp",
)
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in _SHARED)
# Two cores: threads of engine, trainer and tests must not fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs that a test starts take all cores. Beside the runs of the other pytest worker, threads that spin while they wait
# for each other would cost half of the time.
os.environ |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
# No test has an account, asks a hub or joins somebody's Ray.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
for name in [name for name in os.environ if name.startswith(("WANDB_", "RAY_"))]:
    del os.environ[name]
# Fresh processes for tests, forked from one that has done nothing but these imports, which take seconds.
multiprocessing.set_forkserver_preload(
    [
        "skyrl_spec.controller.run",
        "skyrl_spec.planning.preflight",
        "skyrl_spec.checkpoint.dist",
        "tiny_checkpoints",
        "vllm.entrypoints.llm",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_worker",
    ]
)
# Too late in those processes for the environment that an engine's own process begins with.
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}


# Before pytest-xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests that share fixtures to one worker (``make test`` runs two): those of a file, and those of ``whole``.

    The fixture ``whole`` is a run that takes minutes.
    """
    for item in items:
        fixtures = item.fixturenames if isinstance(item, pytest.Function) else []
        item.add_marker(pytest.mark.xdist_group("whole" if "whole" in fixtures else str(item.path)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the session; a process can join but one."""
    from skyrl_spec.controller.placement import ray_session

    with ray_session(verbose=False):
        yield
