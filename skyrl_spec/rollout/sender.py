"""The trainer's side of vLLM's own GPU weight transfer (``nccl``); CPU engines get weights over Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine


class ExportSource(WeightSource):
    """vLLM's weight source over what a trainer exports."""

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
    """All rollout engines as the one inference side that vLLM's sender drives, for the policy or the draft."""

    def __init__(self, engines: list[Any], tensor_parallel_size: int, draft: bool):
        self._engines, self._tp, self._draft = engines, tensor_parallel_size, draft

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine gets ranks of its own in the transfer group."""
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
        # Versions are set by the one place that orders a sync, after policy and draft are both there.
        ray.get([engine.finish_weight_update.remote() for engine in self._engines])


def build_senders(
    sources: dict[str, WeightSource],
    engines: list[Any],
    *,
    rank: int,
    tensor_parallel_size: int,
    master_address: str,
    master_port: int,
) -> dict[str, TrainerWeightTransferEngine]:
    """A sender for each of ``sources`` ("policy", "draft"); every trainer rank calls this, rank 0 sends."""
    clients = {which: EnginesClient(engines, tensor_parallel_size, draft=which == "draft") for which in sources}
    info = NCCLTrainerInitInfo(
        master_address=master_address,
        master_port=master_port,
        world_size=1 + len(engines) * tensor_parallel_size,
        rank=rank,
    )
    policy = NCCLTrainerWeightTransferEngine.trainer_init(info, client=clients["policy"], source=sources["policy"])
    senders: dict[str, TrainerWeightTransferEngine] = {"policy": policy}
    if "draft" in sources:
        # An engine has one transfer group: the draft's sender uses it too, rather than replacing it.
        draft = NCCLTrainerWeightTransferEngine(
            client=clients["draft"], source=sources["draft"], is_sender=info.is_sender, packed=info.packed
        )
        draft.model_update_group = policy.model_update_group
        senders["draft"] = draft
    return senders
