"""Pytest plugin of a mutant's run: every process imports the package of the copy that the tests stand in."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Enough for the tests of training, and without vLLM, whose import takes longer than most of them.
_PRELOAD = ["skyrl_spec.training.trainer", "skyrl_spec.checkpoint.dist", "tiny_checkpoints"]


# Last, so that tests/conftest.py has set both already.
@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    import skyrl_spec

    assert is_in_copy(skyrl_spec.__file__), f"{skyrl_spec.__file__} is not in {ROOT}"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    multiprocessing.set_forkserver_preload(_PRELOAD)


def is_in_copy(file: str | None) -> bool:
    return file is not None and Path(file).resolve().is_relative_to(ROOT)
