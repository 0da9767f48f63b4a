"""Runs the command in a fresh process, forked from one with the imports already done (tests/conftest.py)."""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Completed:
    returncode: int
    stdout: str
    stderr: str


def run_command(argv: list[str], folder: Path, environment: dict[str, str], timeout_s: float = 120.0) -> Completed:
    """Runs ``skyrl-spec *argv`` in ``folder``, with ``environment`` added to this process's environment.

    Raises:
        TimeoutError: not done after ``timeout_s``; the process is killed.
    """
    process = multiprocessing.get_context("forkserver").Process(target=_child, args=(argv, folder, environment))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"skyrl-spec {' '.join(argv)} was not done after {timeout_s:.0f} s")
    assert process.exitcode is not None
    return Completed(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def _child(argv: list[str], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    from skyrl_spec.cli import main

    sys.exit(main(argv))
