"""Workers that raise, hang, or find a port taken: one line, a log file, a restart."""

from __future__ import annotations

import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import faulty_run
import pytest
import ray
from runs import WHOLE, Run, assert_same_run, launch

from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.errors import ActorError, LostActorError
from skyrl_spec.settings.schema import Config
from skyrl_spec.training.worker import PolicyWorker

OOM = "policy worker 0 of 1 raised OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
# Longer than a call takes on a slow machine.
WORKER_TIMEOUT_S = 60
Whole = tuple[Path, str, list[dict[str, Any]]]


def start_faulty(folder: Path, faults: list[str], *overrides: str) -> Run:
    path = folder / "faults"
    path.write_text("".join(f"{line}\n" for line in faults))
    command = [sys.executable, faulty_run.__file__, "train", *WHOLE, *overrides, f"trainer.run_dir={folder / 'run'}"]
    return launch(folder / "run", command, **{faulty_run.FAULTS: str(path)})


def test_a_worker_that_runs_out_of_memory_ends_the_run_with_a_line_and_a_log_file(tmp_path: Path) -> None:
    # Two mini-batches a step.
    run = start_faulty(tmp_path, ["4 raise"], "trainer.ckpt_interval=1", "trainer.eval_before_train=false")
    output = run.output(timeout_s=300)
    assert run.process.returncode == 1, output
    assert run.processes() == []
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if "error" in line]
    log = run.run_dir / "errors" / "actor_error_1.log"
    go_on = f"the same command with trainer.resume_mode=latest goes on from {run.run_dir}/checkpoints/step_1"
    assert line == f"skyrl-spec: error: {OOM} (traceback: {log}); {go_on}"
    text = log.read_text()
    assert re.search(r'File ".*\.py", line \d+, in train_mini_batch', text)
    assert "\x1b" not in text
    assert "GPU 0 has 79 GiB." in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_may_restart_goes_on_from_its_checkpoint_after_a_fault_and_a_hang(
    tmp_path: Path, whole: Whole
) -> None:
    timeouts = [f"trainer.placement.{name}_timeout_s={WORKER_TIMEOUT_S}" for name in ("worker", "collective")]
    # In the second step, and in the fourth: the second worker begins with the second step, and hangs in the fourth.
    faults = ["4 raise", "5 hang"]
    run = start_faulty(tmp_path, faults, "trainer.ckpt_interval=1", "trainer.max_restarts=2", *timeouts)
    output = run.output(timeout_s=600)
    assert run.process.returncode == 0, output
    assert run.processes() == []
    assert "Traceback" not in output, output
    first, second = [line for line in output.splitlines() if "warning" in line]
    log = run.run_dir / "errors" / "actor_error_1.log"
    checkpoints = f"{run.run_dir}/checkpoints"
    assert first == (
        f"skyrl-spec: warning: {OOM} (traceback: {log}); going on from {checkpoints}/step_1 (trainer.max_restarts)"
    )
    hangs = "policy worker 0 did not answer train_mini_batch within trainer.placement.worker_timeout_s=60"
    assert second.startswith(f"skyrl-spec: warning: {hangs}")
    assert second.endswith(f"; going on from {checkpoints}/step_3 (trainer.max_restarts)")
    assert_same_run(run.run_dir, (whole[0], whole[2]))


@ray.remote(num_cpus=0)
class Double:
    """Stands where a worker would. It finds the first ``num_taken`` ports taken, hangs, or raises."""

    def __init__(self, num_taken: int = 0):
        self._num_taken, self.ports = num_taken, []

    def ping(self) -> None:
        time.sleep(3600)

    def free_address(self) -> tuple[str, int]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return "127.0.0.1", probe.getsockname()[1]

    def connect(self, _backend: str, _engines: Any, _components: Any, address: tuple[str, int]) -> None:
        self.ports.append(address[1])
        with socket.socket() as other, socket.socket() as mine:
            if len(self.ports) <= self._num_taken:
                other.bind(("", address[1]))
                other.listen()
            mine.bind(("", address[1]))

    def save_hf(self, _run_dir: Path) -> None:
        raise ValueError("first line\nsecond line")

    def tried(self) -> list[int]:
        return self.ports


def double(num_taken: int = 0) -> Any:
    actor_class: Any = Double
    return actor_class.remote(num_taken)


def test_a_port_that_is_taken_is_replaced_by_another(ray_cluster: None) -> None:
    worker = double(num_taken=2)
    PolicyGroup([worker], [(0, 0)], timeout_s=60).connect("nccl", [], ["policy"], timeout_s=60)
    assert len(set(ray.get(worker.tried.remote()))) == 3
    ray.kill(worker)


def test_ports_that_are_taken_again_and_again_are_an_error(ray_cluster: None) -> None:
    worker = double(num_taken=99)
    with pytest.raises(ActorError, match=r"policy worker 0 of 1 raised OSError: .*Address already in use"):
        PolicyGroup([worker], [(0, 0)], timeout_s=60).connect("nccl", [], ["policy"], timeout_s=60)
    assert len(ray.get(worker.tried.remote())) == 3
    ray.kill(worker)


def test_an_exception_of_a_worker_is_one_line_with_its_traceback_aside(ray_cluster: None, tmp_path: Path) -> None:
    workers = [double(), double()]
    with pytest.raises(ActorError) as caught:
        PolicyGroup(workers, [(0, 0), (0, 1)], timeout_s=60).save_hf(tmp_path)
    assert str(caught.value) in {f"policy worker {rank} of 2 raised ValueError: first line" for rank in (0, 1)}
    assert "in save_hf" in caught.value.traceback
    assert "second line" in caught.value.traceback
    for worker in workers:
        ray.kill(worker)


def test_an_idle_worker_that_does_not_answer_is_lost(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyrl_spec.controller.workers._PING_S", 1.0)
    worker = double()
    # Not the deadline of a call.
    with pytest.raises(LostActorError, match="policy worker 0 did not answer ping"):
        PolicyGroup([worker], [(0, 0)], timeout_s=3600).check()
    ray.kill(worker)


def test_the_port_of_the_store_stays_bound(ray_cluster: None) -> None:
    """Nobody can take it between its choice and its use."""
    worker_class: Any = PolicyWorker
    worker = worker_class.options(num_cpus=0).remote(Config(), 0, 2, 1)
    host, port = ray.get(worker.serve_store.remote(), timeout=120)
    assert host == ray.util.get_node_ip_address()
    with socket.socket() as mine, pytest.raises(OSError, match="Address already in use"):
        mine.bind(("", port))
    ray.kill(worker)
