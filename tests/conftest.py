"""What all tests share: one local Ray, and the import paths of pytest for the processes it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SHARED = ("tests/dist", "tests/megatron", "tests/rollout", "tests/e2e", "examples/arithmetic_mtp")
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in _SHARED)
# Two cores: threads of engine, trainer and tests must not fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the session; a process can join but one."""
    from skyrl_spec.trainer.placement import ray_session

    with ray_session(verbose=False):
        yield
