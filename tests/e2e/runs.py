"""Helpers for tests that start, watch and end whole runs of the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from skyrl_spec.metrics import names

ROOT = Path(__file__).resolve().parents[2]
MARK = "SKYRL_SPEC_TEST_RUN"
SKYRL_SPEC = [sys.executable, "-m", "skyrl_spec"]
# Few and short steps: these tests check that the components work together.
SMALL = [
    "trainer.max_training_steps=2",
    "trainer.train_batch_size=8",
    "trainer.policy_mini_batch_size=4",
    "generator.n_samples_per_prompt=4",
    "trainer.eval_interval=2",
    "trainer.measure_speedup=false",
    "generator.inference_engine.cpu_kvcache_space=0.25",
    # Repeatable bit by bit.
    "generator.speculation.schedule=fixed",
    "trainer.draft.train=every_step",
]
WHOLE = ["experiment=cpu_mtp_grpo", *SMALL, "trainer.max_training_steps=5", "trainer.eval_interval=5"]
WHOLE += ["trainer.mtp.num_speculative_tokens=3", "trainer.mtp.positions_per_step=1.0"]
ASKED = ["trainer.measure_speedup=true", "trainer.logger=[console,wandb]", "trainer.canary.lossless_interval=2"]
WARMUP = [
    *SMALL,
    "trainer.warmup.num_steps=3",
    "trainer.ckpt_interval=1",
    # A schedule that does not depend on the length of the run.
    "trainer.warmup.optimizer_config.scheduler=constant",
    "trainer.eval_before_train=false",
]
# A run that is told to stop ends within seconds. This bounds one that hangs.
STOP_TIMEOUT_S = 180.0
# Runs a command in a mount namespace, which ends with it: a file system with room for one and a half checkpoints.
ON_A_SMALL_DISK = 'mkdir -p "$0" && mount -t tmpfs -o size=100m tmpfs "$0" && "$@"; status=$?; ls "$0"; exit $status'


@dataclass
class Run:
    process: subprocess.Popen[str]
    run_dir: Path
    mark: str

    def output(self, timeout_s: float) -> str:
        return self.process.communicate(timeout=timeout_s)[0]

    def processes(self) -> list[psutil.Process]:
        """Processes of the command that still run."""
        own = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    own.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return own

    def wait_for_steps(self, num_records: int, timeout_s: float = 240) -> None:
        """Waits until ``metrics.jsonl`` has ``num_records`` lines: steps, and the evaluation before the first."""
        deadline = time.monotonic() + timeout_s
        while len(records_of(self.run_dir)) < num_records:
            assert self.process.poll() is None, self.output(timeout_s=1)
            assert time.monotonic() < deadline, f"there are no {num_records} records"
            time.sleep(0.05)

    def actor(self, doing: str, timeout_s: float = 60) -> psutil.Process:
        """Process of an actor: any of the class ``doing``, or ("Class.method") one that executes this method."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    if " ".join(process.cmdline()).startswith(f"ray::{doing}"):
                        return process
        raise AssertionError(f"no actor is {doing}")


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """Complete lines of ``metrics.jsonl``."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def launch(run_dir: Path, command: Sequence[str], **environment: str) -> Run:
    """Starts any command in the repository, without this machine's accounts and Ray."""
    mark = uuid.uuid4().hex
    # A run takes all cores, unlike a test. It must keep OMP_WAIT_POLICY (tests/conftest.py).
    dropped = ("RAY_", "WANDB_", "OMP_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=kept | {MARK: mark} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Ray's processes may signal their whole group when they end, and the tests are not to be in it.
        start_new_session=True,
    )
    return Run(process, run_dir, mark)


def start(
    run_dir: Path, *overrides: str, command: str = "train", prefix: Sequence[str] = (), **environment: str
) -> Run:
    words = [*prefix, *SKYRL_SPEC, command, *overrides, f"trainer.run_dir={run_dir}"]
    return launch(run_dir, words, **environment)


def finish(
    run_dir: Path, *overrides: str, command: str = "train", timeout_s: float = 400, **environment: str
) -> tuple[str, list[dict[str, Any]]]:
    """Runs to the end; returns the terminal's text and ``metrics.jsonl``."""
    run = start(run_dir, *overrides, command=command, **environment)
    output = run.output(timeout_s)
    assert run.process.returncode == 0, output
    assert run.processes() == []
    return output, records_of(run_dir)


def stopped(run_dir: Path, overrides: list[str], signum: signal.Signals, *, times: int) -> tuple[Run, str]:
    """Starts a run and sends it a signal after its first step. Checks that it ends and leaves nothing behind."""
    shared_before = set(os.listdir("/dev/shm"))
    # A separate folder shows everything that is left. Its path is short for Ray's sockets.
    temporary = Path(tempfile.mkdtemp(prefix="t"))
    run = start(run_dir, *overrides, TMPDIR=str(temporary))
    metrics = run.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"trainer/step": 1' in metrics.read_text()):
        assert run.process.poll() is None, run.output(timeout_s=1)
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.5)
    for _ in range(times):
        run.process.send_signal(signum)
        time.sleep(0.1)
    output = run.output(STOP_TIMEOUT_S)
    assert "Traceback" not in output, output
    assert run.processes() == []
    assert set(os.listdir("/dev/shm")) <= shared_before
    assert list(temporary.glob("skyrl-*")) == []
    shutil.rmtree(temporary)
    return run, output


def small_disk(folder: Path) -> list[str]:
    """Prefix of a command that makes ``folder`` a small disk; empty if user namespaces may not mount one."""
    words = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode:
        print("no small disk: unshare may not mount a tmpfs here")
        return []
    return [*words, "sh", "-c", ON_A_SMALL_DISK, str(folder)]


def assert_same_run(run_dir: Path, expected: tuple[Path, list[dict[str, Any]]]) -> None:
    """Checks that final weights are bitwise equal, and that the run's metrics, except timings, equal the expected."""
    assert_same_records(records_of(run_dir), expected[1])
    assert_same_weights(run_dir, expected[0])


def assert_same_records(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Checks that all metrics but timings are among the expected."""
    assert [record[names.STEP] for record in records] == [record[names.STEP] for record in expected]
    for mine, theirs in zip(records, expected, strict=True):
        assert without_timings(mine).items() <= without_timings(theirs).items()


def assert_same_weights(run_dir: Path, other_dir: Path) -> None:
    """Checks that the final weights of two runs are bitwise equal."""
    final, other = (load_file(path / "model" / "model.safetensors") for path in (run_dir, other_dir))
    assert final.keys() == other.keys()
    assert all(torch.equal(final[name], other[name]) for name in other)


def without_timings(record: dict[str, Any]) -> dict[str, Any]:
    timed = ("timing/", names.THROUGHPUT, names.TRAINER_IDLE, names.ENGINES_IDLE)
    return {key: value for key, value in record.items() if not key.startswith(timed)}
