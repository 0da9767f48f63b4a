"""Process groups of the policy workers: gloo on CPU, NCCL on GPU."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skyrl_spec.models import megatron_patches


@dataclass(frozen=True)
class Parallel:
    """This rank's device and process groups. Losses get their group as an argument, never from a global."""

    device: torch.device
    rank: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    # Ranks with other rows of a batch, and the same part of the model and of a pack.
    dp_group: dist.ProcessGroup
    # Ranks with the same part of the model, over which gradients are summed.
    dp_cp_group: dist.ProcessGroup

    @property
    def tp_rank(self) -> int:
        return dist.get_rank(self.tp_group)

    @property
    def tp_size(self) -> int:
        return dist.get_world_size(self.tp_group)

    @property
    def cp_rank(self) -> int:
        return dist.get_rank(self.cp_group)

    @property
    def cp_size(self) -> int:
        return dist.get_world_size(self.cp_group)

    @property
    def replica(self) -> int:
        """Number of this rank's copy of its part of the model."""
        return dist.get_rank(self.dp_cp_group)

    @property
    def rank_in_replica(self) -> int:
        """Number of this rank among those with the same rows of a batch."""
        return self.tp_rank + self.tp_size * self.cp_rank

    @property
    def dp_rank(self) -> int:
        return dist.get_rank(self.dp_group)

    @property
    def dp_size(self) -> int:
        return dist.get_world_size(self.dp_group)


def initialize(
    *,
    rank: int,
    world_size: int,
    tensor_parallel_size: int,
    context_parallel_size: int = 1,
    device: torch.device,
    store: dist.Store,
    timeout_s: float,
) -> Parallel:
    """Joins the workers' process group and lays Megatron's groups over it, tensor parallelism innermost.

    Args:
        store: where the ranks meet; rank 0 serves it.
        timeout_s: seconds that a rank waits for the others in a collective.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return lay_out(tensor_parallel_size, device, context_parallel_size)


def lay_out(tensor_parallel_size: int, device: torch.device, context_parallel_size: int = 1) -> Parallel:
    """Lays Megatron's groups over the process group that exists."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size, context_parallel_size=context_parallel_size
    )
    megatron_patches.prepare(device)
    return Parallel(
        device=device,
        rank=dist.get_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def shutdown() -> None:
    """Leaves all groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
