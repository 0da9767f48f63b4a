"""Pytest plugin of a mutant's run: every process has the package of the copy that the tests stand in."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing

ROOT = Path(__file__).resolve().parents[2]


# Last, so that tests/conftest.py has set the variable already.
@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    import skyrl_spec

    assert is_in_copy(skyrl_spec.__file__), f"{skyrl_spec.__file__} is not in {ROOT}"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    multiprocessing.set_forkserver_preload([])
    _fork_ranks()


def is_in_copy(file: str | None) -> bool:
    return file is not None and Path(file).resolve().is_relative_to(ROOT)


def _fork_ranks() -> None:
    """Ranks of a test are forks of its process, which has imported everything; a forkserver would import it anew."""
    start_processes = torch.multiprocessing.start_processes

    def fork(*args: Any, **kwargs: Any) -> Any:
        return start_processes(*args, **kwargs | {"start_method": "fork"})

    torch.multiprocessing.start_processes = fork
