"""Trainer's side of vLLM's GPU weight transfers (``nccl``, ``ipc``). CPU engines receive weights over Ray instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES


class ExportSource(WeightSource):
    """vLLM's weight source for the tensors that the trainer exports."""

    def __init__(
        self,
        shapes: list[tuple[str, torch.dtype, tuple[int, ...]]],
        export: Callable[[], Iterator[tuple[str, Tensor]]],
    ):
        self._metadata = [ParamMeta(name, dtype, shape) for name, dtype, shape in shapes]
        self._export = export

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._export()


class EnginesClient:
    """All rollout engines as the single inference side that vLLM's sender expects, for policy or draft weights."""

    def __init__(self, engines: list[Any], tensor_parallel_size: int, draft: bool):
        self._engines, self._tp, self._draft = engines, tensor_parallel_size, draft

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects every engine. In an NCCL group each gets its own ranks; ``ipc`` has no ranks."""
        infos = [
            init_info | {"rank_offset": init_info["rank_offset"] + index * self._tp}
            if "rank_offset" in init_info
            else init_info
            for index in range(len(self._engines))
        ]
        ray.get(
            [engine.init_weight_transfer_engine.remote(info) for engine, info in zip(self._engines, infos, strict=True)]
        )

    def start_weight_update(self) -> None:
        ray.get([engine.start_weight_update.remote(self._draft) for engine in self._engines])

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        ray.get([engine.update_weights.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        # WeightSync sets the versions, once both policy and draft have arrived.
        ray.get([engine.finish_weight_update.remote() for engine in self._engines])


def build_senders(
    sources: dict[str, WeightSource],
    engines: list[Any],
    *,
    backend: str,
    rank: int,
    tensor_parallel_size: int,
    master_address: str,
    master_port: int,
) -> dict[str, TrainerWeightTransferEngine]:
    """A sender for each of ``sources`` ("policy", "draft"). Every trainer rank calls this; rank 0 calls the engines.

    With ``nccl``, rank 0 broadcasts from its GPU, and the ranks meet at address and port. With ``ipc``, every rank,
    including data-parallel replicas, packs all weights on its own GPU for the engine there.
    """
    clients = {
        component: EnginesClient(engines, tensor_parallel_size, draft=component == "draft") for component in sources
    }
    if backend == "ipc":
        return {component: _ipc_sender(source, clients[component], rank) for component, source in sources.items()}
    info = NCCLTrainerInitInfo(
        master_address=master_address,
        master_port=master_port,
        world_size=1 + len(engines) * tensor_parallel_size,
        rank=rank,
    )
    return _nccl_senders(sources, clients, info)


def _ipc_sender(source: WeightSource, client: EnginesClient, rank: int) -> TrainerWeightTransferEngine:
    """Sender over shared GPU memory. Its handshake only says how weights are packed, so each sender makes its own."""
    # A tensor is never split. All ranks see the same metadata, so their chunks end at the same tensors.
    largest = max(math.prod(meta.shape) * meta.dtype.itemsize for meta in source.metadata())
    info = IPCTrainerInitInfo(
        packed=True, packed_buffer_size_bytes=max(largest, DEFAULT_PACKED_BUFFER_SIZE_BYTES), rank=rank
    )
    return IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)


def _nccl_senders(
    sources: dict[str, WeightSource], clients: dict[str, EnginesClient], info: NCCLTrainerInitInfo
) -> dict[str, TrainerWeightTransferEngine]:
    """Senders over NCCL. An engine has one transfer group: the first sender opens it, and the others share it."""
    (first, source), *others = sources.items()
    opened = NCCLTrainerWeightTransferEngine.trainer_init(info, client=clients[first], source=source)
    senders: dict[str, TrainerWeightTransferEngine] = {first: opened}
    for component, source in others:
        sender = NCCLTrainerWeightTransferEngine(
            client=clients[component], source=source, is_sender=info.is_sender, packed=info.packed
        )
        sender.model_update_group = opened.model_update_group
        senders[component] = sender
    return senders
