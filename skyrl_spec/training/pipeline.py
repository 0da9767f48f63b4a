"""Micro-batches through the stages of the policy, by Megatron's schedule.

Every stage has the same packs, so each knows the shape of what it receives, and no shapes are sent.

Shapes: T tokens of this rank, or its part of them under sequence parallelism, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from skyrl_spec.models import megatron_patches
from skyrl_spec.models.pack import Pack
from skyrl_spec.models.parallel import Parallel

Item = TypeVar("Item")
# (items, model) -> (output, loss of it): Megatron's ``forward_step_func``.
ForwardStep = Callable[[Iterator[Item], nn.Module], tuple[Tensor, Callable[..., Any]]]


def run(
    forward_step: ForwardStep[Item],
    model: nn.Module,
    items: Sequence[Item],
    packs: Sequence[Pack],
    parallel: Parallel,
    *,
    forward_only: bool = False,
) -> None:
    """Runs ``items``, one after the other, through all stages. Collective over the ranks of a pipeline.

    Args:
        model: this rank's stage, or Megatron's DDP around it.
        packs: of each item.
    """
    pipeline: dict[str, Any] = {}
    config = model.config
    if parallel.pp_size > 1:
        shapes = [state_shape(pack, config) for pack in packs]
        pipeline = {
            "p2p_communicator": _KnownShapes(parallel.pp_group, config, shapes),
            "pg_collection": _groups(parallel),
        }
    with megatron_patches.megatron_device(parallel.device):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(items),
            model=model,
            num_microbatches=len(items),
            # Shapes are those of the packs.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            **pipeline,
        )


def no_loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
    """For a forward pass whose results are already taken: a loss function for Megatron's schedule."""
    return output, torch.zeros((), dtype=torch.int, device=output.device), None


def state_shape(pack: Pack, config: Any) -> list[int]:
    """Shape of a layer's output ``[T, 1, D]`` on this rank."""
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return [-(-pack.num_own // ranks), 1, config.hidden_size]


class _KnownShapes(P2PCommunicator):
    """Megatron's exchange between stages, which would send the shape of each tensor before it."""

    def __init__(self, group: dist.ProcessGroup, config: Any, shapes: Sequence[list[int]]):
        super().__init__(group, config)
        # States and gradients arrive in the order of the micro-batches.
        self._states, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        none = [0, 0, 0]
        return next(self._states) if recv_prev else none, next(self._gradients) if recv_next else none


def _groups(parallel: Parallel) -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    groups.tp, groups.cp, groups.pp = parallel.tp_group, parallel.cp_group, parallel.pp_group
    groups.dp_cp = parallel.dp_cp_group
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    return groups
