"""Run by ``run.py`` with the unbroken tests: the package is that of the copy, in the processes that tests start too."""

from __future__ import annotations

import subprocess
import sys

from plugin import is_in_copy
from spawn import run_distributed


def check_package(_rank: int) -> None:
    import skyrl_spec

    assert is_in_copy(skyrl_spec.__file__), skyrl_spec.__file__


def test_forked_processes_import_the_copy() -> None:
    run_distributed(check_package, 1)


def test_subprocesses_import_the_copy() -> None:
    command = [sys.executable, "-c", "import skyrl_spec; print(skyrl_spec.__file__)"]
    assert is_in_copy(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
