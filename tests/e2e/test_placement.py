"""GPUs of workers and engines, placed by a real Ray whose machines declare GPUs that they lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import placement_probe
import pytest


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Report of the probe, which runs in a separate process: this one may have joined the session's Ray."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # Ray's files, the address of this cluster among them. The prefix is short: its sockets' paths are limited.
    with tempfile.TemporaryDirectory(prefix="skyrl-", ignore_cleanup_errors=True) as directory:
        done = subprocess.run(
            [sys.executable, placement_probe.__file__],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": directory},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def gpu(place: dict[str, Any]) -> tuple[str, int]:
    (gpu_id,) = place["gpu_ids"]
    # CUDA sees this GPU and no other, as device 0.
    assert place["visible"] == str(gpu_id)
    return place["node_id"], gpu_id


def test_worker_and_engine_of_a_rank_share_a_gpu(report: dict[str, Any]) -> None:
    workers = [gpu(place) for place in report["shared"]["workers"]]
    engines = [gpu(place) for place in report["shared"]["engines"]]
    assert workers == engines
    assert len(set(workers)) == 4


def test_an_engine_of_two_gpus_shares_those_of_two_ranks(report: dict[str, Any]) -> None:
    workers = [gpu(place) for place in report["shared_by_two"]["workers"]]
    engines = report["shared_by_two"]["engines"]
    seen = [(engine["node_id"], int(device)) for engine in engines for device in engine["visible"].split(",")]
    assert len(engines) == 2
    assert seen == workers


@pytest.mark.parametrize("layout", ["shared", "own"])
def test_neighbours_are_on_a_node(report: dict[str, Any], layout: str) -> None:
    nodes = [place["node_id"] for place in report[layout]["workers"]]
    assert nodes[0::2] == nodes[1::2], "a tensor-parallel pair is scattered"


def test_without_sharing_everyone_has_a_gpu_of_its_own(report: dict[str, Any]) -> None:
    assert len({gpu(place) for name in ("workers", "engines") for place in report["own"][name]}) == 4


@pytest.mark.parametrize("layout", ["shared", "shared_by_two", "own"])
def test_gpus_are_given_back(report: dict[str, Any], layout: str) -> None:
    assert report[layout]["free_gpus"] == 4


@pytest.mark.parametrize(("case", "num_workers"), [("scattered", 3), ("too_many", 5)])
def test_workers_that_do_not_fit_on_a_machine_are_one_line_by_the_deadline(
    report: dict[str, Any], case: str, num_workers: int
) -> None:
    line = report[case]["line"]
    assert line.startswith(
        f"trainer.placement.timeout_s=3: {num_workers} policy workers on each of 1 machines were not up in time "
        "(GPUs in the cluster: 4"
    )
    assert "ask for fewer GPUs" in line
    assert "\n" not in line
    assert placement_probe.TIMEOUT_S <= report[case]["elapsed_s"] < placement_probe.TIMEOUT_S + 5
    # No placement group waits on.
    assert set(report[case]["states"]) == {"REMOVED"}


@pytest.mark.parametrize(
    ("case", "where"), [("8_on_one", "8 policy workers on each of 1"), ("5_and_3", "4 policy workers on each of 2")]
)
def test_eight_workers_are_refused_where_machines_have_five_and_three_gpus(
    report: dict[str, Any], case: str, where: str
) -> None:
    """Each of two tensor-parallel groups of four must be on one machine, and eight GPUs are free."""
    line = report[case]["line"]
    assert line.startswith(
        f"trainer.placement.timeout_s=3: {where} machines were not up in time (GPUs in the cluster: 12"
    )
    assert "trainer.placement.policy_num_gpus_per_node, policy_num_nodes" in line
    assert report[case]["elapsed_s"] < placement_probe.TIMEOUT_S + 5
    assert set(report[case]["states"]) == {"REMOVED"}


def test_no_tensor_parallel_group_of_four_crosses_machines(report: dict[str, Any]) -> None:
    nodes = report["nodes"]
    assert nodes == [nodes[0]] * 4 + [nodes[4]] * 4
    assert nodes[0] != nodes[4]


def test_a_weight_transfer_that_hangs_is_an_engine_lost(report: dict[str, Any]) -> None:
    line = report["hanging_transfer"]
    assert line.startswith("policy worker 0 did not answer send within generator.inference_engine.generate_timeout_s=3")


def test_a_worker_that_hangs_is_lost(report: dict[str, Any]) -> None:
    line = report["hanging_worker"]
    assert line.startswith("policy worker 0 did not answer send within trainer.placement.worker_timeout_s=3")
    assert "\n" not in line
