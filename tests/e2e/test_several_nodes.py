"""Runs on several Ray nodes of this machine: who is where, weights between nodes, and a node that is killed."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private.state import GlobalState
from ray.cluster_utils import Cluster
from runs import SMALL, Run, records_of, start

from skyrl_spec.metrics import names

STAGES = [
    "experiment=cpu_dflash_grpo",
    *SMALL,
    "trainer.eval_before_train=false",
    "trainer.canary.interval=1",
    "trainer.placement.policy_num_nodes=2",
    "trainer.placement.policy_num_gpus_per_node=1",
    "trainer.policy.megatron_config.pipeline_model_parallel_size=2",
    "generator.inference_engine.num_engines=2",
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster with one node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Sockets below it have short paths.
    with tempfile.TemporaryDirectory(prefix="skyrl-", ignore_cleanup_errors=True) as folder:
        head = {"num_cpus": 1, "temp_dir": folder, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


def _wait(run: Run, cluster: Cluster, num_records: int) -> dict[str, set[str]]:
    """Waits for so many steps, and returns the nodes on which actors were seen meanwhile, by class.

    A short run may be over before somebody who waited for its steps can ask.
    """
    state = GlobalState()
    state._initialize_global_state(ray._raylet.GcsClientOptions.create(cluster.address, None, True, False))
    found: dict[str, set[str]] = defaultdict(set)
    deadline = time.monotonic() + 180
    while len(records_of(run.run_dir)) < num_records:
        assert run.process.poll() is None, run.output(10)
        assert time.monotonic() < deadline
        for actor in state.actor_table(None, None, "ALIVE").values():
            found[actor["ActorClassName"]].add(actor["Address"]["NodeID"])
        time.sleep(0.2)
    state.disconnect()
    return found


def test_stages_and_engines_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    run = start(tmp_path / "run", *STAGES, RAY_ADDRESS=cluster.address)
    nodes = _wait(run, cluster, 1)
    output = run.output(120)
    assert run.process.returncode == 0, output
    assert len(nodes["PolicyWorker"]) == len(nodes["EngineActor"]) == 2, nodes
    for record in records_of(run.run_dir):
        # Weights of both stages have reached the engines of both nodes.
        assert record[names.CANARY_POLICY] < 1e-4
        assert record[names.CANARY_DRAFT] < 1e-4


@pytest.mark.slow
def test_a_run_goes_on_without_a_node_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    overrides = [*STAGES, "trainer.max_training_steps=6", "trainer.ckpt_interval=1", "trainer.max_restarts=1"]
    run = start(tmp_path / "run", *overrides, RAY_ADDRESS=cluster.address)
    nodes = _wait(run, cluster, 2)
    lost = next(node for node in others if node.node_id in nodes["PolicyWorker"])
    cluster.remove_node(lost, allow_graceful=False)
    output = run.output(300)
    assert run.process.returncode == 0, output
    assert "going on from" in output or "restart" in output, output
    assert [record["trainer/step"] for record in records_of(run.run_dir)] == [1, 2, 3, 4, 5, 6]
