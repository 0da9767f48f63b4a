"""Breaks one line at a time in a copy of the code, and shows which test fails (``make mutants``).

    python tests/mutants/run.py             every mutant of ``mutants.py``
    python tests/mutants/run.py clip mtp    those whose name or file has one of these words

The sources are never changed: two mutants run at a time, each in a copy of its own. The tests run once without a break
first. A mutant is caught if a test fails; one that all tests pass, or that runs into the time limit, is not.

Imports take longer than most tests. So this process imports what the tests need, but nothing of the project, and forks
for every mutant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mutant import Mutant
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("skyrl_spec", "tests", "examples", "configs", "pyproject.toml")
IMPORTED = (
    "hypothesis",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel",
    "omegaconf",
    "pytest",
    "scipy.stats",
    "torch.distributed.checkpoint",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
# Every process of a run imports the package of its copy; needs real processes to be sure.
CHECK_OF_COPY = "tests/mutants/check_copy.py"
AT_A_TIME = 2
UNBROKEN_LIMIT_S = 1200.0


@dataclass(frozen=True)
class Outcome:
    """``test`` is the one that failed first, empty if none did; then ``problem`` says what happened instead."""

    test: str
    problem: str
    seconds: float


def make_copy(target: Path) -> Path:
    """What the tests need of the project, at ``target``."""
    ignored = shutil.ignore_patterns("__pycache__", "runs", "outputs", ".pytest_cache")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, target / name)
    return target


def import_for_tests() -> None:
    """In this process, once for all that are forked from it."""
    # Read on import. Threads do not live through a fork.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with warnings.catch_warnings():
        # Megatron says on import what is not installed.
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(name)
    assert "skyrl_spec" not in sys.modules


class Run:
    """pytest in a process of its own, forked from this one, until the first test fails."""

    def __init__(self, copy: Path, tests: Sequence[str], limit_s: float):
        self._output = copy / "output"
        self._limit_s, self._start = limit_s, time.monotonic()
        # What is not written yet would be written by both.
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _be_pytest(copy, tests, self._output)

    def outcome(self) -> Outcome | None:
        """None while it runs."""
        seconds = time.monotonic() - self._start
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0 and seconds < self._limit_s:
            return None
        # Also processes that a failed test has left.
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        if pid == 0:
            os.waitpid(self._pid, 0)
            return Outcome("", f"not done after {self._limit_s:.0f} s", seconds)
        return Outcome(*_read(os.waitstatus_to_exitcode(status), self._output.read_text()), seconds)


def _be_pytest(copy: Path, tests: Sequence[str], output: Path) -> None:
    """The rest of a forked process."""
    status = 99
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests" / "mutants")]
        # A compiled file of a break could be taken for the code as it is: both are written within a second.
        sys.dont_write_bytecode = True
        import pytest

        options = ["-x", "-q", "--no-header", "-p", "plugin", "-p", "no:cacheprovider"]
        status = int(pytest.main([*options, *tests]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def _read(status: int, output: str) -> tuple[str, str]:
    """The test that failed first, and the problem if none did."""
    if status == 0:
        return "", "all tests pass"
    failed = [line.split(maxsplit=1)[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    # 1: tests failed. Anything else is a break that no test had to see, or a fault of this script.
    if status == 1 and failed:
        return failed[0].split(" - ")[0], ""
    return "", f"pytest ended with {status}: {' '.join(output.split())[-300:]}"


def run_unbroken(copy: Path, mutants: Sequence[Mutant]) -> None:
    """Every test that is named passes as the code is."""
    tests = [CHECK_OF_COPY, *dict.fromkeys(test for mutant in mutants for test in mutant.tests)]
    print(f"{len(tests)} tests and test files without a break ...", flush=True)
    run = Run(copy, tests, UNBROKEN_LIMIT_S)
    while (outcome := run.outcome()) is None:
        time.sleep(0.1)
    if outcome.problem != "all tests pass":
        sys.exit(f"without a break: {outcome.test or outcome.problem} ({outcome.seconds:.0f} s)")
    print(f"pass, {outcome.seconds:.0f} s", flush=True)


def run_mutants(copies: Sequence[Path], mutants: Sequence[Mutant], limit_s: float) -> Iterator[tuple[Mutant, Outcome]]:
    """Mutants with their outcomes, as they come: one at a time in each copy."""
    free, waiting = list(copies), list(mutants)
    running: list[tuple[Mutant, Path, str, Run]] = []
    while waiting or running:
        while free and waiting:
            mutant, copy = waiting.pop(0), free.pop()
            source = (copy / mutant.file).read_text()
            (copy / mutant.file).write_text(mutant.broken(source))
            running.append((mutant, copy, source, Run(copy, mutant.tests, limit_s)))
        time.sleep(0.1)
        for job in list(running):
            mutant, copy, source, run = job
            if (outcome := run.outcome()) is not None:
                running.remove(job)
                (copy / mutant.file).write_text(source)
                free.append(copy)
                yield mutant, outcome


def table(outcomes: dict[Mutant, Outcome], mutants: Sequence[Mutant]) -> str:
    """Markdown, a row a mutant."""
    lines = ["| mutant | file | break | caught by | s |", "|---|---|---|---|---|"]
    for mutant in mutants:
        outcome = outcomes[mutant]
        change = f"{_code(mutant.before)} → {_code(mutant.after)}"
        caught = f"`{outcome.test.removeprefix('tests/')}`" if outcome.test else f"**{outcome.problem}**"
        row = (mutant.name, f"`{mutant.file.removeprefix('skyrl_spec/')}`", change, caught, f"{outcome.seconds:.0f}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`" if text.strip() else "nothing"


def main(words: Sequence[str], limit_s: float) -> int:
    mutants = [mutant for mutant in MUTANTS if mutant.matches(words)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [make_copy(Path(folder) / str(index)) for index in range(AT_A_TIME)]
        # A break that cannot be made any more ends the run before it takes minutes.
        for mutant in mutants:
            mutant.broken((copies[0] / mutant.file).read_text())
        import_for_tests()
        run_unbroken(copies[0], mutants)
        outcomes: dict[Mutant, Outcome] = {}
        for mutant, outcome in run_mutants(copies, mutants, limit_s):
            outcomes[mutant] = outcome
            found = f"caught by {outcome.test}" if outcome.test else f"NOT CAUGHT ({outcome.problem})"
            print(f"{len(outcomes):3}/{len(mutants)}  {outcome.seconds:4.0f} s  {mutant.name}: {found}", flush=True)
    survivors = [mutant.name for mutant in mutants if not outcomes[mutant].test]
    minutes = (time.monotonic() - start) / 60
    print(f"\n{table(outcomes, mutants)}\n")
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants caught, {minutes:.1f} minutes")
    if survivors:
        print(f"not caught: {', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the mutants whose name or file has one of these")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a mutant's tests may take (180)")
    arguments = parser.parse_args()
    sys.exit(main(arguments.words, arguments.limit))
