"""A scheduler sends SIGTERM to every process of a job: the run saves, ends with exit code 0, and resumes bitwise."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from runs import STOP_TIMEOUT_S, WHOLE, Run, assert_same_run, finish, records_of, start

from skyrl_spec.controller.processes import kill_all, open_tree
from skyrl_spec.settings.schema import Config
from skyrl_spec.training.worker import PolicyWorker

Whole = tuple[Path, str, list[dict[str, Any]]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_to_every_process_while_sampling_and_while_training_saves(tmp_path: Path, whole: Whole) -> None:
    run_dir = tmp_path / "run"
    # wandb's own process is the only one that the signal ends.
    overrides = [*WHOLE, "trainer.logger=[console,wandb]", "trainer.resume_mode=latest"]
    steps = 0
    for seed, doing in enumerate(("EngineActor.advance", "PolicyWorker.train_mini_batch")):
        run = start(run_dir, *overrides, WANDB_MODE="offline")
        # One more step, and the evaluation before the first.
        run.wait_for_steps(1 + steps + 1)
        signal_all(run, doing, random.Random(seed))
        output = run.output(STOP_TIMEOUT_S)
        assert run.process.returncode == 0, output
        assert run.processes() == []
        assert "Traceback" not in output
        # It may be found to be gone when the run ends.
        lines = [line for line in output.splitlines() if "warning" in line]
        assert [line.partition(";")[0] for line in lines] == ["skyrl-spec: warning: wandb's process ended"]
        steps = len(records_of(run_dir)) - 1
        assert f"skyrl-spec: SIGTERM: saved {run_dir}/checkpoints/step_{steps}; the same command with" in output
    finish(run_dir, *overrides, WANDB_MODE="offline")
    assert_same_run(run_dir, (whole[0], whole[2]))


def signal_all(run: Run, doing: str, order: random.Random) -> None:
    """Sends SIGTERM to each process of the run by its id, in a random order, once an actor is ``doing`` something."""
    processes = run.processes()
    assert len(processes) > 5, "Ray's own processes are not among them"
    order.shuffle(processes)
    run.actor(doing)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def take_a_sigterm(_actor: Any) -> int:
    """Gets SIGTERM as an actor does in a cluster that ``ray start`` started, where no signal is blocked."""
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return os.getpid()


def test_a_worker_outlives_sigterm(ray_cluster: None) -> None:
    worker_class: Any = PolicyWorker
    worker = worker_class.options(num_cpus=0).remote(Config(), 0, 1, 1)
    try:
        before = ray.get(worker.__ray_call__.remote(take_a_sigterm), timeout=120)
        assert ray.get(worker.__ray_call__.remote(take_a_sigterm), timeout=60) == before
    finally:
        ray.kill(worker)


def test_a_process_tree_ends_with_its_orphans() -> None:
    """A process whose parent ended first is found too, because the tree is read while the parent is there."""
    child = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    grandchild = psutil.Process(int(parent.stdout.readline()))
    pidfds = open_tree([parent.pid])
    parent.kill()
    parent.wait()
    assert grandchild.is_running()
    kill_all(pidfds)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
