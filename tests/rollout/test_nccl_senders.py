"""Weights through vLLM's ``nccl`` transfer: our senders and clients, vLLM's classes on both sides.

There is no GPU: ``store_nccl`` has what stands in for it. Engines are actors whose tensor-parallel workers receive
into a dict; tests/gpu has real ones.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch
from ray.actor import ActorHandle
from store_nccl import replacements
from torch import Tensor, nn

from skyrl_spec.rollout.sender import ExportSource, build_senders

NUM_ENGINES, TENSOR_PARALLEL_SIZE = 2, 2
# "R" of a rendezvous; "P" or "D" of an update of policy or draft, "." of its tensors and "|" of its end.
UPDATE = {"policy": "P.|", "draft": "D.|"}


class _Model(nn.Module):
    """Keeps what it is to load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[tuple[str, Tensor]] = []

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        self.loaded += [(name, tensor.clone()) for name, tensor in weights]


@ray.remote(num_cpus=0)
class Engine:
    """vLLM's receiving side, a thread in place of each worker's process."""

    def __init__(self) -> None:
        from types import SimpleNamespace

        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        for where, name, stand_in in replacements():
            setattr(where, name, stand_in)
        self._threads, self._calls = ThreadPoolExecutor(TENSOR_PARALLEL_SIZE), ""
        self._models = [{"policy": _Model(), "draft": _Model()} for _ in range(TENSOR_PARALLEL_SIZE)]
        self._workers = []
        for rank, models in enumerate(self._models):
            parallel = SimpleNamespace(data_parallel_index=0, world_size=TENSOR_PARALLEL_SIZE, rank=rank)
            config = SimpleNamespace(parallel_config=parallel, model_config=None)
            self._workers.append(NCCLWeightTransferEngine(None, config, torch.device("cpu"), models["policy"]))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._calls += "R"
        self._all(lambda worker: worker.init_transfer_engine(worker.init_info_cls(**init_info)))

    def start_weight_update(self, draft: bool) -> None:
        component = "draft" if draft else "policy"
        self._calls += UPDATE[component][0]
        for worker, models in zip(self._workers, self._models, strict=True):
            worker.model = models[component]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._calls += "."
        self._all(lambda worker: worker.receive_weights(worker.update_info_cls(**update_info)))

    def finish_weight_update(self) -> None:
        self._calls += "|"

    def take(self) -> tuple[str, list[dict[str, list[tuple[str, Tensor]]]]]:
        """Calls since the last time, and what they loaded into the models of each worker."""
        calls, loaded = self._calls, []
        for models in self._models:
            loaded.append({component: model.loaded for component, model in models.items() if model.loaded})
            for model in models.values():
                model.loaded = []
        self._calls = ""
        return calls, loaded

    def _all(self, act: Any) -> None:
        list(self._threads.map(act, self._workers))


class Exported:
    """Weights of policy or draft, as a trainer exports them: others each time."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self.source = ExportSource(
            [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors()], self._export
        )
        self.exports: list[list[tuple[str, Tensor]]] = []

    def _tensors(self) -> list[tuple[str, Tensor]]:
        wide = torch.randn(7, 6, generator=self._generator)
        # A part of a tensor, as gathered and split ones are.
        return [("wide", wide), ("part", wide[:, :3]), ("half", wide[0].bfloat16())]

    def _export(self) -> Iterator[tuple[str, Tensor]]:
        self.exports.append(self._tensors())
        return iter(self.exports[-1])


@pytest.fixture(scope="module")
def engines(ray_cluster: None) -> Iterator[list[ActorHandle]]:
    actors = [Engine.remote() for _ in range(NUM_ENGINES)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def connect(engines: list[ActorHandle], sources: dict[str, Exported], rank: int, port: int) -> dict[str, Any]:
    return build_senders(
        {component: exported.source for component, exported in sources.items()},
        engines,
        backend="nccl",
        rank=rank,
        tensor_parallel_size=TENSOR_PARALLEL_SIZE,
        master_address="127.0.0.1",
        master_port=port,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("components", [["policy", "draft"], ["policy"], ["draft"]], ids="-".join)
def test_every_worker_gets_all_that_is_trained_through_one_group(
    engines: list[ActorHandle], components: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up has a draft alone."""
    for where, name, stand_in in replacements():
        monkeypatch.setattr(where, name, stand_in)
    ours, others = ({component: Exported(seed) for seed, component in enumerate(components)} for _ in range(2))
    port = free_port()
    # Only rank 0 meets the engines, once.
    other_senders = connect(engines, others, 1, port)
    assert [calls for calls, _ in ray.get([engine.take.remote() for engine in engines])] == [""] * NUM_ENGINES
    senders = connect(engines, ours, 0, port)
    assert list(senders) == list(other_senders) == components
    assert [calls for calls, _ in ray.get([engine.take.remote() for engine in engines])] == ["R"] * NUM_ENGINES
    # The second update finds what the first one left.
    for num_updates in (1, 2):
        for component in components:
            other_senders[component].send_weights()
            senders[component].send_weights()
            # A rank that does not send gathers with the one that does.
            assert len(ours[component].exports) == len(others[component].exports) == num_updates
        for calls, workers in ray.get([engine.take.remote() for engine in engines]):
            assert calls == "".join(UPDATE[component] for component in components)
            assert len(workers) == TENSOR_PARALLEL_SIZE
            for loaded in workers:
                assert loaded.keys() == set(components)
                for component in components:
                    assert_same_tensors(loaded[component], ours[component].exports[-1])


def assert_same_tensors(mine: list[tuple[str, Tensor]], theirs: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in mine] == [name for name, _ in theirs]
    for (name, tensor), (_, expected) in zip(mine, theirs, strict=True):
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name
