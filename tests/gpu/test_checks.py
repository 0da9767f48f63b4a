"""The runner of the GPU pack, its checks in small on a CPU, and all of them on a CUDA device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_pack
import psutil
import pytest
import torch
from gpu_check import KEEP, Check, Figure, apart
from gpu_checks import CHECKS
from gpu_pack import Outcome, run_checks

CPU = torch.device("cpu")
# One of each module. scripts/gpu_pack.sh rehearse runs them all.
IN_SMALL = (
    "steps mixture",
    "flex attention",
    "varlen attention",
    "fp32 head",
    "offload mtp",
    "offload cycles mimo_7b",
    "training step mimo_7b",
    "weight export",
)


def run_command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, gpu_pack.__file__, *arguments, str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590, check=False)


def test_checks_pass_in_small_on_a_cpu(tmp_path: Path) -> None:
    done = run_command(tmp_path, "--device", "cpu", *(f"--only={name}" for name in IN_SMALL))
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "waits", "ok", "ok", "ok", "ok", "ok"]
    assert last == "7 ok, 1 waits"
    assert len(json.loads((tmp_path / "result.json").read_text())["checks"]) == len(IN_SMALL)
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in report for name in IN_SMALL)


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False")
def test_checks_pass_on_cuda(tmp_path: Path) -> None:
    done = run_command(tmp_path, "--budget", "1100")
    assert done.returncode == 0, done.stdout + done.stderr


def check(function: object, limit_s: float = 60.0, waits_for: str = "") -> Check:
    return Check("a check", "what it shows", function, limit_s, waits_for)  # type: ignore[arg-type]


def outcome_of(folder: Path, one: Check) -> Outcome:
    (outcome,) = run_checks([one], CPU, folder, budget_s=60.0)
    return outcome


@pytest.mark.parametrize(
    ("figure", "state"),
    [
        (Figure(1.0, 1.0), "ok"),
        (Figure(1.1, 1.0), "not ok"),
        (Figure(1.0, 1.0, at_least=True), "ok"),
        (Figure(0.9, 1.0, at_least=True), "not ok"),
        (Figure(float("nan"), 1.0), "not ok"),
        (Figure(float("nan"), 1.0, at_least=True), "not ok"),
        (Figure(5.0), "ok"),
        (Figure(float("inf")), "not ok"),
    ],
)
def test_a_figure_is_held_against_its_limit(tmp_path: Path, figure: Figure, state: str) -> None:
    assert outcome_of(tmp_path, check(lambda *_: figure)).state == state


def test_an_exception_is_not_ok_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_device: torch.device, _folder: Path) -> Figure:
        raise ValueError("no such thing")

    assert outcome_of(tmp_path, check(fails)).state == "not ok"
    assert "ValueError: no such thing" in capsys.readouterr().out
    assert "in fails" in (tmp_path / "report.md").read_text()


def test_a_check_that_dies_is_not_ok(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, check(lambda *_: os._exit(7)))
    assert (outcome.state, outcome.why) == ("not ok", "its process ended with status 7")


def test_a_check_that_hangs_ends_at_its_limit_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "child"

    def hangs(_device: torch.device, _folder: Path) -> Figure:
        if os.fork() == 0:
            marker.write_text(str(os.getpid()))
        time.sleep(600)
        return Figure(0.0)

    outcome = outcome_of(tmp_path / "out", check(hangs, limit_s=10.0))
    assert (outcome.state, outcome.why) == ("not ok", "not done after 10 s")
    child = int(marker.read_text())
    assert is_gone(child)


def is_gone(pid: int, timeout_s: float = 10.0) -> bool:
    """A killed process takes a moment to die, and may wait to be collected if its parent is gone."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_without_time_a_check_is_not_run(tmp_path: Path) -> None:
    outcomes = run_checks([check(lambda *_: Figure(0.0))] * 2, CPU, tmp_path, budget_s=0.5)
    assert {outcome.state for outcome in outcomes} == {"not run"}


def test_what_needs_cuda_waits_for_it_on_a_cpu(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, check(lambda *_: Figure(9.0, 1.0), waits_for="CUDA"))
    assert (outcome.state, outcome.why) == ("waits", "for CUDA")


def test_files_worth_keeping_are_kept(tmp_path: Path) -> None:
    def keeps(_device: torch.device, folder: Path) -> Figure:
        (folder / KEEP).mkdir()
        (folder / KEEP / "trace.json").write_text("{}")
        return Figure(0.0)

    outcome_of(tmp_path, check(keeps))
    assert (tmp_path / "trace.json").read_text() == "{}"


def test_a_function_apart_returns_or_raises() -> None:
    assert torch.equal(apart(torch.ones, 3), torch.ones(3))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        apart(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="its process died"):
        apart(os._exit, 3)


def test_names_are_unique_and_end_a_run_that_is_mistyped(tmp_path: Path) -> None:
    assert len({one.name for one in CHECKS}) == len(CHECKS)
    done = run_command(tmp_path, "--device", "cpu", "--only", "stepz")
    assert done.returncode == 1
    assert done.stderr.startswith("no check's name begins with stepz; there are: steps mtp, ")
