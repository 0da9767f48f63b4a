"""Starts a Ray of several machines with declared GPUs, and prints what was placed where, as JSON."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group

from skyrl_spec.controller.placement import (
    bundles_by_rank,
    engine_options,
    engine_settings,
    reserve_gpus,
    worker_options,
)
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.errors import LostActorError, RunError
from skyrl_spec.settings.schema import Config

NUM_NODES, GPUS_PER_NODE = 2, 2
TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Place:
    """Place of an actor: its machine, the GPUs that Ray gave it, and those that CUDA would see."""

    node_id: str
    gpu_ids: list[int]
    visible: str


@ray.remote
class Probe:
    """Stand-in for an engine or a worker."""

    def place(self) -> Place:
        context = ray.get_runtime_context()
        return Place(context.get_node_id(), ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"])

    def send(self, component: str) -> int:
        """Hangs, as a transfer does whose other side is gone."""
        time.sleep(600)
        return 0


def make_config(num_workers: int, *, colocate_all: bool, num_nodes: int = 1, engine_size: int = 1) -> Config:
    """Configuration of ``num_workers`` workers, evenly on ``num_nodes`` machines."""
    config = Config()
    config.trainer.placement.policy_num_nodes = num_nodes
    config.trainer.placement.policy_num_gpus_per_node = num_workers // num_nodes
    config.trainer.placement.colocate_all = colocate_all
    config.trainer.placement.timeout_s = TIMEOUT_S
    config.generator.inference_engine.num_engines = num_workers // engine_size
    config.generator.inference_engine.tensor_parallel_size = engine_size
    return config


def places(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Places of engines and workers in the order of their ranks, started with the options of a run."""
    gpus = reserve_gpus(config, time.monotonic() + 60.0)
    bundles = bundles_by_rank(gpus)
    probe_class: Any = Probe
    workers = [probe_class.options(**options).remote() for options in worker_options(config, bundles)]
    devices = [place.visible for place in ray.get([worker.place.remote() for worker in workers], timeout=60)]
    engines = [
        probe_class.options(**options).remote()
        for options in engine_options(config, engine_settings(config), bundles, devices)
    ]
    by_role = {
        name: [asdict(place) for place in ray.get([probe.place.remote() for probe in probes], timeout=60)]
        for name, probes in (("engines", engines), ("workers", workers))
    }
    for engine in engines:
        ray.kill(engine)
    PolicyGroup(workers, [(0, 0)], TIMEOUT_S, gpus).shutdown()
    return by_role | {"free_gpus": free_gpus()}


def free_gpus(patience_s: float = 20.0) -> float:
    """GPUs that are free: all, or those that Ray has released after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while (free := ray.available_resources().get("GPU", 0.0)) < NUM_NODES * GPUS_PER_NODE:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return free


def refused(num_workers: int, num_nodes: int = 1) -> dict[str, Any]:
    """The error about workers that do not fit, and the states of all placement groups after it."""
    config = make_config(num_workers, colocate_all=True, num_nodes=num_nodes)
    start = time.monotonic()
    try:
        reserve_gpus(config, start + TIMEOUT_S)
    except RunError as error:
        elapsed_s = time.monotonic() - start
        states = [group["state"] for group in placement_group_table().values()]
        return {"line": str(error), "elapsed_s": elapsed_s, "states": states}
    return {}


def nodes_of_ranks(num_workers: int, num_nodes: int) -> list[str]:
    """Machine of each rank's GPU."""
    groups = reserve_gpus(make_config(num_workers, colocate_all=True, num_nodes=num_nodes), time.monotonic() + 60.0)
    tables = {group.id: placement_group_table(group)["bundles_to_node_id"] for group in groups}
    nodes = [tables[place.placement_group.id][place.placement_group_bundle_index] for place in bundles_by_rank(groups)]
    for group in groups:
        remove_placement_group(group)
    return nodes


def hanging_transfer() -> str:
    """The error about a worker whose transfer of weights hangs."""
    probe_class: Any = Probe
    worker = probe_class.options(num_cpus=0).remote()
    try:
        PolicyGroup([worker], [(0, 0)], timeout_s=60.0).send("policy", timeout_s=TIMEOUT_S)
    except LostActorError as error:
        return str(error)
    finally:
        ray.kill(worker)
    return ""


def hanging_worker() -> str:
    """The error about a worker that does not answer a call."""
    probe_class: Any = Probe
    worker = probe_class.options(num_cpus=0).remote()
    try:
        PolicyGroup([worker], [(0, 0)], timeout_s=TIMEOUT_S)._all("send", "policy")
    except LostActorError as error:
        return str(error)
    finally:
        ray.kill(worker)
    return ""


def main() -> None:
    cluster = Cluster()
    try:
        for _ in range(NUM_NODES):
            cluster.add_node(num_cpus=GPUS_PER_NODE, num_gpus=GPUS_PER_NODE, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False)
        report = {
            "shared": places(make_config(4, colocate_all=True, num_nodes=NUM_NODES)),
            "shared_by_two": places(make_config(4, colocate_all=True, num_nodes=NUM_NODES, engine_size=2)),
            "own": places(make_config(2, colocate_all=False)),
            # There are GPUs enough, but on two machines.
            "scattered": refused(GPUS_PER_NODE + 1),
            "too_many": refused(NUM_NODES * GPUS_PER_NODE + 1),
            "hanging_transfer": hanging_transfer(),
            "hanging_worker": hanging_worker(),
        }
        for num_gpus in (5, 3):
            cluster.add_node(num_cpus=num_gpus, num_gpus=num_gpus, include_dashboard=False)
        report |= {"8_on_one": refused(8), "5_and_3": refused(8, num_nodes=2)}
        cluster.add_node(num_cpus=4, num_gpus=4, include_dashboard=False)
        report["nodes"] = nodes_of_ranks(8, num_nodes=2)
        print(json.dumps(report))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
