"""Engines, workers and the driver are killed in whole runs, whose results stay bitwise the same."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from runs import STOP_TIMEOUT_S, WHOLE, Run, assert_same_run, finish, records_of, small_disk, start, stopped

from skyrl_spec.checkpoint.folders import latest

Whole = tuple[Path, str, list[dict[str, Any]]]
# Ray's helpers, which wait a minute for Ray's server before they end.
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
GO_ON = "the same command with trainer.resume_mode=latest goes on from"


def test_engines_that_die_or_hang_cost_no_rollout_and_a_full_disk_no_step(tmp_path: Path, whole: Whole) -> None:
    run_dir = tmp_path / "run"
    mishaps = ["generator.inference_engine.generate_timeout_s=12", "trainer.ckpt_interval=2"]
    prefix = small_disk(run_dir / "checkpoints")
    run = start(run_dir, *WHOLE, *mishaps, "trainer.on_ckpt_failure=warn", prefix=prefix)
    run.wait_for_steps(2)
    run.actor("EngineActor.advance").kill()
    run.wait_for_steps(4)
    run.actor("EngineActor.advance").suspend()
    output = run.output(timeout_s=300)
    assert run.process.returncode == 0, output
    assert run.processes() == []
    assert output.count("skyrl-spec: warning: rollout engine 0 died (killed or crashed: ") == 1
    assert output.count("skyrl-spec: warning: rollout engine 0 did not answer within generator.inference_engine.") == 1
    assert output.count("it is restarted, and its prompts are generated again") == 2
    assert "Traceback" not in output, output
    assert "(raylet)" not in output
    if prefix:
        for step in (4, 5):
            line = f"warning: {run_dir}/checkpoints/step_{step}: the checkpoint could not be written (No space left on"
            assert output.count(line) == 1
        # The shell lists the disk at the end.
        assert output.splitlines()[-2:] == ["latest", "step_2"]
    assert_same_run(run_dir, (whole[0], whole[2]))


@pytest.mark.slow
def test_a_run_that_is_preempted_loses_a_worker_and_its_driver_goes_on_bit_by_bit(tmp_path: Path, whole: Whole) -> None:
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    # make, timeout and CI send a signal twice: to the process group, and from the parent that got it. The step in
    # progress is finished and saved.
    endless = [*WHOLE, "trainer.max_training_steps=50"]
    run, output = stopped(run_dir, endless, signal.SIGTERM, times=2)
    assert run.process.returncode == 0, output
    step = len(records_of(run_dir)) - 1
    assert f"skyrl-spec: SIGTERM: saved {checkpoints}/step_{step}; the same command with" in output
    # The second step may have begun to train when the signal came.
    assert step in (1, 2)

    go_on = [*WHOLE, "trainer.resume_mode=latest", "trainer.ckpt_interval=1"]
    run = start(run_dir, *go_on)
    run.wait_for_steps(1 + step + 1)
    run.actor("PolicyWorker").kill()
    output = run.output(STOP_TIMEOUT_S)
    assert run.process.returncode == 1, output
    assert run.processes() == []
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert line.startswith("skyrl-spec: error: policy worker 0 of 1 died (killed or crashed: ")
    # The checkpoint that it resumed from, if the worker died during the first save.
    assert line.endswith(f"; {GO_ON} {latest(checkpoints)}")

    run = start(run_dir, *go_on)
    run.actor("PolicyWorker.start", timeout_s=120)
    os.kill(run.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    run.process.wait()
    while left(run):
        assert time.monotonic() - killed < STOP_TIMEOUT_S, left(run)
        time.sleep(0.2)

    finish(run_dir, *go_on)
    assert_same_run(run_dir, (whole[0], whole[2]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("saves_beside", [False, True], ids=["saves_between_steps", "saves_beside_training"])
def test_a_run_that_may_restart_loses_both_workers(tmp_path: Path, whole: Whole, saves_beside: bool) -> None:
    restarts = ["trainer.max_restarts=2", "trainer.ckpt_interval=2"]
    restarts += [f"trainer.policy.megatron_config.async_dist_ckpt_save={str(saves_beside).lower()}"]
    run = start(tmp_path / "run", *WHOLE, *restarts)
    # Before and after the first checkpoint.
    for num_records in (2, 4):
        run.wait_for_steps(num_records)
        run.actor("PolicyWorker").kill()
        time.sleep(5)
    output = run.output(timeout_s=300)
    assert run.process.returncode == 0, output
    assert output.count("died (killed or crashed: ") == 2
    # Before and after the first checkpoint. The step in progress may be complete when the signal comes.
    went_on = re.findall(r"going on from (?:the beginning|.*/(step_\d)) \(trainer.max_restarts\)", output)
    assert len(went_on) == 2
    assert went_on[-1] in ("step_2", "step_4")
    assert_same_run(run.run_dir, (whole[0], whole[2]))


def left(run: Run) -> list[str]:
    lines = [" ".join(process.cmdline()) for process in run.processes()]
    return [line for line in lines if not line.startswith(RAY_AGENTS)]
