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
    # Ranks with the other layers of the model, in their order, and the same part of each matrix.
    pp_group: dist.ProcessGroup
    # Of experts: ranks with the others of a layer, ranks that share each of its matrices, and ranks with the same
    # experts, over which their gradients are summed. They are laid over the ranks of a stage on their own.
    ep_group: dist.ProcessGroup
    expert_tp_group: dist.ProcessGroup
    expert_dp_group: dist.ProcessGroup
    # None without pipeline parallelism: the same ranks, for what travels beside the pipeline; the first and the last of
    # them; all ranks of this stage; this rank alone.
    side_group: dist.ProcessGroup | None = None
    ends_group: dist.ProcessGroup | None = None
    stage_group: dist.ProcessGroup | None = None
    alone_group: dist.ProcessGroup | None = None

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
    def expert_replica(self) -> int:
        """Number of this rank's copy of its experts."""
        return dist.get_rank(self.expert_dp_group)

    @property
    def divides_experts(self) -> bool:
        """Whether other ranks, of other replicas too, have the rest of a layer's experts."""
        return dist.get_world_size(self.ep_group) * dist.get_world_size(self.expert_tp_group) > 1

    @property
    def rank_in_replica(self) -> int:
        """Number of this rank among those with the same rows of a batch. Those of the last stage come first."""
        stages_behind = self.pp_size - 1 - self.pp_rank
        return self.tp_rank + self.tp_size * (self.cp_rank + self.cp_size * stages_behind)

    @property
    def pp_rank(self) -> int:
        return dist.get_rank(self.pp_group)

    @property
    def pp_size(self) -> int:
        return dist.get_world_size(self.pp_group)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def rank_of_stage(self, stage: int) -> int:
        """Number in the world of the rank of ``pp_group`` that has this stage."""
        return dist.get_global_rank(self.pp_group, stage)

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
    pipeline_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
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
    return lay_out(
        tensor_parallel_size,
        device,
        context_parallel_size,
        pipeline_parallel_size,
        expert_parallel_size,
        expert_tensor_parallel_size,
    )


def lay_out(
    tensor_parallel_size: int,
    device: torch.device,
    context_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
) -> Parallel:
    """Lays Megatron's groups over the process group that exists."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
    )
    megatron_patches.prepare(device)
    pipeline = {} if pipeline_parallel_size == 1 else _pipeline_groups(pipeline_parallel_size)
    return Parallel(
        device=device,
        rank=dist.get_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        expert_tp_group=parallel_state.get_expert_tensor_parallel_group(),
        expert_dp_group=parallel_state.get_expert_data_parallel_group(),
        **pipeline,
    )


def _pipeline_groups(size: int) -> dict[str, dist.ProcessGroup]:
    """The groups of ``Parallel`` that only a pipeline has. All ranks make all groups, in the same order."""
    # Megatron's order has pipeline stages outermost.
    world = list(range(dist.get_world_size()))
    per_stage = len(world) // size
    pipelines = [world[first::per_stage] for first in range(per_stage)]
    stages = [world[first : first + per_stage] for first in range(0, len(world), per_stage)]
    return {
        "side_group": dist.new_subgroups_by_enumeration(pipelines)[0],
        "ends_group": _own_group([[ranks[0], ranks[-1]] for ranks in pipelines]),
        "stage_group": dist.new_subgroups_by_enumeration(stages)[0],
        "alone_group": dist.new_subgroups_by_enumeration([[rank] for rank in world])[0],
    }


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """The one of these groups that this rank is in."""
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    return next((group for ranks, group in made if dist.get_rank() in ranks), None)


def shutdown() -> None:
    """Leaves all groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
