"""Breaks one line at a time in a copy of the code, and shows which test fails (``make mutants``).

    python tests/mutants/run.py             every mutant of ``mutants.py``
    python tests/mutants/run.py clip mtp    those whose name or file has one of these words

The sources are never changed: each of two workers has a copy of its own. The tests run once without a break first. A
mutant is caught if a test fails; one that all tests pass, or that runs into the time limit, is not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from mutant import Mutant
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("skyrl_spec", "tests", "examples", "configs", "pyproject.toml")
# Every process of a run imports the package of its copy; needs real processes to be sure.
CHECK_OF_COPY = "tests/mutants/check_copy.py"
NUM_WORKERS = 2
UNBROKEN_LIMIT_S = 900.0


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


@contextmanager
def broken(mutant: Mutant, copy: Path) -> Iterator[None]:
    """Inside, ``mutant`` is in the copy."""
    path = copy / mutant.file
    source = path.read_text()
    path.write_text(mutant.broken(source))
    try:
        yield
    finally:
        path.write_text(source)


def run_tests(copy: Path, tests: Sequence[str], limit_s: float) -> Outcome:
    """Run ``tests`` in the copy until the first failure."""
    paths = [str(copy), str(copy / "tests" / "mutants")]
    # Without compiled files: one that is broken and restored within a second could be taken for the other.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "plugin", "-p", "no:cacheprovider"]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, *tests],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        test, problem = _read(process.returncode, output)
    except subprocess.TimeoutExpired:
        test, problem = "", f"not done after {limit_s:.0f} s"
    finally:
        # Also processes that a test that failed has left.
        _end_session(process)
    return Outcome(test, problem, time.monotonic() - start)


def _read(status: int, output: str) -> tuple[str, str]:
    """The test that failed first, and the problem if none did."""
    if status == 0:
        return "", "all tests pass"
    failed = [line.split(maxsplit=1)[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    # 1: tests failed. Anything else is a break that no test had to see, or a fault of this script.
    if status == 1 and failed:
        return failed[0].split(" - ")[0], ""
    return "", f"pytest ended with {status}: {' '.join(output.split())[-300:]}"


def _end_session(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_unbroken(copy: Path, mutants: Sequence[Mutant]) -> None:
    """Every test that is named passes as the code is."""
    tests = [CHECK_OF_COPY, *dict.fromkeys(test for mutant in mutants for test in mutant.tests)]
    print(f"{len(tests)} tests and test files without a break ...", flush=True)
    outcome = run_tests(copy, tests, UNBROKEN_LIMIT_S)
    if outcome.problem != "all tests pass":
        sys.exit(f"without a break: {outcome.test or outcome.problem} ({outcome.seconds:.0f} s)")
    print(f"pass, {outcome.seconds:.0f} s", flush=True)


def run_mutants(copies: Sequence[Path], mutants: Sequence[Mutant], limit_s: float) -> dict[Mutant, Outcome]:
    """The outcome of each, one worker a copy; prints them as they come."""
    free: SimpleQueue[Path] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def run(mutant: Mutant) -> Outcome:
        copy = free.get()
        try:
            with broken(mutant, copy):
                return run_tests(copy, mutant.tests, limit_s)
        finally:
            free.put(copy)

    outcomes = {}
    with ThreadPoolExecutor(len(copies)) as workers:
        pending = {workers.submit(run, mutant): mutant for mutant in mutants}
        for future in as_completed(pending):
            mutant, outcome = pending[future], future.result()
            outcomes[mutant] = outcome
            said = f"caught by {outcome.test}" if outcome.test else f"NOT CAUGHT ({outcome.problem})"
            print(f"{len(outcomes):3}/{len(mutants)}  {outcome.seconds:4.0f} s  {mutant.name}: {said}", flush=True)
    return outcomes


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
        copies = [make_copy(Path(folder) / str(index)) for index in range(min(NUM_WORKERS, len(mutants)))]
        for mutant in mutants:
            mutant.broken((copies[0] / mutant.file).read_text())
        run_unbroken(copies[0], mutants)
        outcomes = run_mutants(copies, mutants, limit_s)
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
