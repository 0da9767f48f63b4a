"""Signals at any moment of a run, from its first imports on: its line, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from runs import SMALL, start

# Seconds after the start: imports, Ray, engines, calibration, the canary, the first steps.
MOMENTS = (0.3, 1, 2, 4, 6, 8, 11, 14, 18, 23, 30, 40)
LIMIT_S = 10.0
ENDLESS = [
    "experiment=cpu_mtp_grpo",
    *SMALL,
    "trainer.max_training_steps=100",
    "generator.speculation.schedule=auto",
    "trainer.ckpt_interval=1",
]


def check(tmp_path: Path, moment: float, number: signal.Signals, *, group: bool) -> None:
    # A separate folder shows everything that is left. Its path is short for Ray's sockets.
    temporary = Path(tempfile.mkdtemp(prefix="t"))
    run = start(tmp_path / "run", *ENDLESS, TMPDIR=str(temporary))
    time.sleep(moment)
    begin = time.monotonic()
    # The driver leads a group of its own (``launch``). Ray's processes must be in others.
    os.killpg(run.process.pid, number) if group else run.process.send_signal(number)
    output = run.output(timeout_s=60)
    seconds = time.monotonic() - begin
    last = output.splitlines()[-1] if output else ""
    if (tmp_path / "run" / "checkpoints" / "latest").exists() and number == signal.SIGTERM:
        assert (run.process.returncode, last[:27]) == (0, "skyrl-spec: SIGTERM: saved "), output
    else:
        assert run.process.returncode == 128 + number, output
        assert last.startswith(f"skyrl-spec: {number.name}: stopped"), output
    assert "Traceback" not in output, output
    # Ray's own lines, such as "[2026-01-01 00:00:00,000 E 1 1] ...".
    assert not re.search(r"^\[\d{4}-", output, re.MULTILINE), output
    assert seconds < LIMIT_S, f"{seconds:.1f} s"
    assert run.processes() == []
    assert list(temporary.glob("skyrl-*")) == []
    shutil.rmtree(temporary)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("group", [False, True], ids=["driver", "group"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_the_run_at_every_moment(tmp_path: Path, moment: float, group: bool) -> None:
    number = (signal.SIGTERM, signal.SIGINT)[MOMENTS.index(moment) % 2]
    check(tmp_path, moment, number, group=group)


@pytest.mark.timeout(240)
def test_a_signal_to_the_whole_group_while_engines_start(tmp_path: Path) -> None:
    check(tmp_path, 9, signal.SIGTERM, group=True)
