"""Order and versions of a sync: what an engine is told, and when. That real engines obey is shown in tests/rollout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from ray.actor import ActorHandle

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.rollout.actor import EngineActor
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.payload import pack_chunks, payload_bytes, unpack_weights
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.types import Component, Prompt, Versions

NAMES = ("first", "second")


@ray.remote(num_cpus=0)
class Engine(EngineActor):
    """Notes its calls in place of building vLLM; a sync reaches it as it reaches any engine."""

    def __init__(self) -> None:
        self._calls: list[Any] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._calls.append("connect")

    def start_weight_update(self, draft: bool) -> None:
        self._calls.append("draft" if draft else "policy")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._calls += [(name, tensor.item()) for name, tensor in unpack_weights(**update_info)]

    def finish_weight_update(self) -> None:
        self._calls.append("finish")

    def reset_prefix_cache(self) -> None:
        self._calls.append("reset")

    def set_versions(self, versions: Versions) -> None:
        self._calls.append(versions)

    def generate(self, prompts: list[list[int]], sampling: SamplingConfig, n: int, seed: int) -> list[Any]:
        self._calls.append([len(prompts), seed])
        return [[ids[0]] * n for ids in prompts]

    def take(self) -> list[Any]:
        calls, self._calls = self._calls, []
        return calls


class Workers:
    """Weights that are other ones at each export: two tensors of policy and draft, a chunk each."""

    def __init__(self) -> None:
        self.num_exports: dict[Component, int] = {"policy": 0, "draft": 0}
        self.calls: list[str] = []

    def export(self, component: Component) -> list[tuple[ray.ObjectRef, int]]:
        self.num_exports[component] += 1
        weights = [(f"{component}.{name}", torch.tensor([self.value(component, i)])) for i, name in enumerate(NAMES)]
        return [(ray.put(chunk), payload_bytes(chunk)) for chunk in pack_chunks(weights, max_bytes=4)]

    def value(self, component: Component, index: int) -> float:
        return 100.0 * (component == "draft") + 10.0 * index + self.num_exports[component]

    def update(self, component: Component) -> list[Any]:
        """What an engine is told of the last export."""
        weights = [(f"{component}.{name}", self.value(component, index)) for index, name in enumerate(NAMES)]
        return [component, *weights, "finish"]

    def connect(self, backend: str, engines: list[Any], components: list[Component], timeout_s: float) -> None:
        self.calls.append(f"connect {backend}")

    def send(self, component: Component, timeout_s: float) -> int:
        self.calls.append(f"send {component}")
        return 8


@pytest.fixture(scope="module")
def engine_processes(ray_cluster: None) -> Iterator[list[ActorHandle]]:
    actors = [Engine.remote() for _ in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture
def engines(engine_processes: list[ActorHandle]) -> list[ActorHandle]:
    """Two engines without a call so far."""
    taken(engine_processes)
    return engine_processes


def taken(engines: list[ActorHandle]) -> list[list[Any]]:
    return ray.get([engine.take.remote() for engine in engines])


def test_policy_then_draft_then_the_cache_then_one_version(engines: list[ActorHandle]) -> None:
    workers = Workers()
    sync = WeightSync(workers, EngineGroup(engines, timeout_s=60), backend="ray", components=["policy", "draft"])
    assert taken(engines) == [["connect"]] * 2
    for version in (1, 2):
        assert sync.sync() == 4 * 2 * len(NAMES)
        expected = [*workers.update("policy"), *workers.update("draft"), "reset", Versions(version, version)]
        assert taken(engines) == [expected] * 2
        assert sync.versions == Versions(version, version)
    # Back to a checkpoint.
    sync.restore(Versions(1, 1))
    assert [calls[-1] for calls in taken(engines)] == [Versions(1, 1)] * 2
    sync.sync()
    assert sync.versions == Versions(2, 2)


def test_what_engines_have_lost_is_sent_though_it_did_not_change(engines: list[ActorHandle]) -> None:
    """It keeps its version."""
    workers = Workers()
    sync = WeightSync(workers, EngineGroup(engines, timeout_s=60), backend="ray", components=["policy", "draft"])
    sync.sync()
    taken(engines)
    sync.weights_are_gone()
    sync.sync(draft=False)
    assert taken(engines) == [[*workers.update("policy"), *workers.update("draft"), "reset", Versions(2, 1)]] * 2
    # Once.
    sync.sync(draft=False)
    assert taken(engines) == [[*workers.update("policy"), "reset", Versions(3, 1)]] * 2


def test_what_is_frozen_is_not_sent_and_stays_at_version_0(engines: list[ActorHandle]) -> None:
    workers = Workers()
    sync = WeightSync(workers, EngineGroup(engines, timeout_s=60), backend="ray", components=["draft"])
    taken(engines)
    sync.sync()
    assert taken(engines) == [[*workers.update("draft"), "reset", Versions(0, 1)]] * 2


def test_a_draft_that_was_not_trained_is_not_sent_and_keeps_its_version(engines: list[ActorHandle]) -> None:
    workers, group = Workers(), EngineGroup(engines[:1], timeout_s=60)
    sync = WeightSync(workers, group, backend="ray", components=["policy", "draft"])
    sync.sync()
    taken(engines)
    assert sync.sync(draft=False) == 4 * len(NAMES)
    assert taken(engines)[0] == [*workers.update("policy"), "reset", Versions(2, 1)]
    sync.sync()
    assert sync.versions == Versions(3, 3)
    # An engine that starts again needs both.
    sync.sync(draft=False)
    assert group._bring_up is not None
    group._bring_up(engines[1])
    expected = [*workers.update("policy"), *workers.update("draft"), "reset", Versions(4, 3)]
    assert taken(engines)[1] == ["connect", *expected]


def test_a_replaced_engine_gets_what_the_others_have(engines: list[ActorHandle]) -> None:
    workers, group = Workers(), EngineGroup(engines[:1], timeout_s=60)
    sync = WeightSync(workers, group, backend="ray", components=["policy", "draft"])
    sync.sync()
    assert group._bring_up is not None
    group._bring_up(engines[1])
    expected = [*workers.update("policy"), *workers.update("draft"), "reset", Versions(1, 1)]
    assert taken(engines)[1] == ["connect", *expected]


def test_an_engine_replaced_beside_training_gets_the_weights_of_the_last_sync(engines: list[ActorHandle]) -> None:
    workers, group = Workers(), EngineGroup(engines[:1], timeout_s=60)
    sync = WeightSync(workers, group, backend="ray", components=["policy", "draft"], keeps_updates=True)
    assert group._bring_up is not None
    # Before the first sync the weights are those of the files.
    group._bring_up(engines[1])
    assert taken(engines)[1] == ["connect", "reset", Versions()]
    sync.sync()
    drafts = workers.update("draft")
    sync.sync(draft=False)
    taken(engines)
    group._bring_up(engines[1])
    assert taken(engines)[1] == ["connect", *workers.update("policy"), *drafts, "reset", Versions(2, 1)]
    assert workers.num_exports == {"policy": 2, "draft": 1}


def test_a_sync_that_is_left_out_is_counted(engines: list[ActorHandle]) -> None:
    sync = WeightSync(Workers(), EngineGroup(engines, timeout_s=60), backend="ray", components=["policy", "draft"])
    taken(engines)
    sync.skip(draft=False)
    assert taken(engines) == [[], []]
    assert sync.versions == Versions(1, 0)


def test_prompts_go_to_their_engines_and_responses_come_in_order(engines: list[ActorHandle]) -> None:
    group = EngineGroup(engines, timeout_s=60)
    prompts = [Prompt(f"{number}", [number], [], "", {}) for number in range(5)]
    assert group.generate(prompts, SamplingConfig(), 2, 7) == [[number] * 2 for number in range(5)]
    assert taken(engines) == [[[3, 14]], [[2, 15]]]


def test_over_a_gpu_transfer_the_order_is_the_same(engines: list[ActorHandle]) -> None:
    workers = Workers()
    sync = WeightSync(workers, EngineGroup(engines, timeout_s=60), backend="nccl", components=["policy", "draft"])
    assert sync.sync() == 16
    assert workers.calls == ["connect nccl", "send policy", "send draft"]
    assert taken(engines) == [["reset", Versions(1, 1)]] * 2
