"""Runs the checks of the GPU pack one after the other: a line for each, then ``result.json`` and ``report.md``.

    python tests/gpu/gpu_pack.py OUT                  on CUDA, in the sizes of real models
    python tests/gpu/gpu_pack.py OUT --device cpu     in small, what needs no CUDA
    python tests/gpu/gpu_pack.py OUT --only steps     those whose names begin with this; may be given several times

The exit status is 0 if every check that could run passed. Files are written after every check, so that a run that is
cut off leaves what it has seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_check import KEEP, Check
from gpu_checks import CHECKS
from gpu_report import describe_machine, draw_pictures, write_report

# Exit status of a process that is not a check's own.
_BROKEN = 99


@dataclass(frozen=True)
class Outcome:
    """What came of a check. ``state``: "ok", "not ok", "waits" (for what it needs) or "not run" (no time was left)."""

    name: str
    what: str
    state: str
    seconds: float = 0.0
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    at_least: bool = False
    # The reason of any state but "ok".
    why: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the terminal."""
        parts = [f"{self.state:8}{self.name:31}", self.figure()]
        if self.seconds:
            parts.append(f"({self.seconds:.0f} s)")
        return "  ".join([part for part in parts if part] + ([self.why.splitlines()[-1]] if self.why else []))

    def figure(self) -> str:
        """Value, unit and limit."""
        if self.value is None:
            return ""
        limit = "" if self.limit is None else f" (limit: {'>=' if self.at_least else '<='} {self.limit:g})"
        return f"{self.value:.3g} {self.unit}{limit}"


def run_check(check: Check, device: torch.device, limit_s: float, keep: Path) -> Outcome:
    """The outcome of ``check`` in a fork of this process, which has imported everything and used no CUDA."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        folder, result = Path(temporary) / "files", Path(temporary) / "result.json"
        folder.mkdir()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _be_check(check, device, folder, result)
        status = _wait(pid, start + limit_s)
        seconds = time.monotonic() - start
        for file in (folder / KEEP).glob("*"):
            shutil.copy(file, keep)
        found = json.loads(result.read_text()) if result.is_file() else {}
    if status is None:
        found = {"state": "not ok", "why": f"not done after {limit_s:.0f} s"}
    elif not found:
        found = {"state": "not ok", "why": f"its process ended with status {status}"}
    return Outcome(check.name, check.what, seconds=seconds, **found)


def _wait(pid: int, deadline: float) -> int | None:
    """Status of the process. None: it was killed at the deadline, with its children."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _kill_group(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    _kill_group(pid)
    os.waitpid(pid, 0)
    return None


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _be_check(check: Check, device: torch.device, folder: Path, result: Path) -> None:
    """The rest of a forked process."""
    try:
        os.setsid()
        found: dict[str, Any]
        try:
            figure = check.run(device, folder)
            found = asdict(figure) | {"state": "ok" if figure.is_ok else "not ok", "why": ""}
        except Exception:
            found = {"state": "not ok", "why": traceback.format_exc().strip()}
        result.with_suffix(".part").write_text(json.dumps(found))
        result.with_suffix(".part").rename(result)
    finally:
        os._exit(0 if result.is_file() else _BROKEN)


def run_checks(
    checks: Sequence[Check], device: torch.device, out: Path, budget_s: float, slowness: float = 1.0
) -> list[Outcome]:
    """Outcomes, printed and written as they come. ``slowness`` multiplies the limits of time."""
    end = time.monotonic() + budget_s
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for check in checks:
        left_s = end - time.monotonic()
        if check.waits_for and device.type == "cpu":
            outcome = Outcome(check.name, check.what, "waits", why=f"for {check.waits_for}")
        elif left_s < 1.0:
            outcome = Outcome(check.name, check.what, "not run", why=f"the {budget_s:.0f} s of the run are over")
        else:
            outcome = run_check(check, device, min(check.limit_s * slowness, left_s), out)
        outcomes.append(outcome)
        print(outcome.line(), flush=True)
        written = {"machine": describe_machine(device), "checks": [asdict(outcome) for outcome in outcomes]}
        (out / "result.json").write_text(json.dumps(written, indent=1))
        write_report(written, out / "report.md")
        draw_pictures(written, out)
    return outcomes


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cpu") if arguments.device == "cpu" else torch.device("cuda", 0)
    chosen = [c for c in CHECKS if not arguments.only or c.name.startswith(tuple(arguments.only))]
    if not chosen:
        names = ", ".join(check.name for check in CHECKS)
        sys.exit(f"no check's name begins with {' or '.join(arguments.only)}; there are: {names}")
    if device.type == "cuda" and torch.cuda.device_count() == 0:
        sys.exit("--device cuda: this machine has no CUDA device; use --device cpu for what needs none")
    # Megatron logs what is not installed, and advice for other programs.
    logging.disable(logging.WARNING)
    assert not torch.cuda.is_initialized(), "an import has used CUDA, so no fork of this process can"
    outcomes = run_checks(chosen, device, Path(arguments.out), arguments.budget, 1.0 if device.type == "cuda" else 5.0)
    counts = {state: sum(o.state == state for o in outcomes) for state in ("ok", "not ok", "waits", "not run")}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return 1 if counts["not ok"] or counts["not run"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder for result.json, report.md and files of the checks")
    parser.add_argument("--only", action="append", default=[], help="run the checks whose names begin with this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all checks together (540)")
    sys.exit(main(parser.parse_args()))
