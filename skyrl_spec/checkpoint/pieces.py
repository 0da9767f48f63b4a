"""This rank's pieces of all trained tensors, as boxes of the full tensors in the canonical layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from skyrl_spec.checkpoint.optimizer_state import TrainableState, main_parameter, optimizers
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.conversion import Rule, canonical_shard, hf_shapes
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.types import Component


@dataclass(frozen=True)
class SavedComponent:
    """Trained module with its optimizer, and the conversion rules of its parameters."""

    trainable: TrainableState
    rules: list[Rule]
    # Where the values of a tensor are: the tensor itself, or its copy in host memory.
    current: Callable[[Tensor], Tensor] = lambda tensor: tensor


def sharded(components: Mapping[Component, SavedComponent]) -> dict[str, ShardedTensor]:
    """This rank's pieces of all tensors, by unique names. They are views, so a load writes into the tensors."""
    pieces: dict[str, ShardedTensor] = {}
    for name, component in components.items():
        module = component.trainable.module
        parameters = megatron_patches.named_parameters(module)
        # Any other state would be lost silently.
        stateful = {
            megatron_patches.name_in_model(module, key)
            for key, value in module.state_dict().items()
            if isinstance(value, Tensor)
        }
        assert stateful <= parameters.keys() == {rule.megatron for rule in component.rules}, (
            stateful ^ parameters.keys()
        )
        for rule in component.rules:
            for kind, flat, start, replica in _tensors(component, parameters[rule.megatron]):
                place = _Place.of(rule, parameters[rule.megatron], component.trainable.parallel)
                key = tensor_key(name, kind, rule)
                for index, piece in enumerate(place.pieces(key, flat, start, replica)):
                    pieces[f"{key}.{index}"] = piece
    return pieces


def main_replicas(pieces: Mapping[str, ShardedTensor], *, copies: bool) -> dict[str, ShardedTensor]:
    """The pieces that this rank writes. ``copies``: in host memory of their own.

    It is not page-locked: PyTorch rounds page-locked blocks up to powers of two, and keeps them.
    """
    chosen = {name: piece for name, piece in pieces.items() if is_main_replica(piece.replica_id)}
    if not copies:
        return chosen
    return {name: replace(piece, data=piece.data.to("cpu", copy=True)) for name, piece in chosen.items()}


def tensor_key(name: str, kind: str, rule: Rule) -> str:
    """Name of a stored tensor: component, kind (``param``, ``exp_avg``, ``exp_avg_sq``, ``master``), parameter."""
    return f"{name}.{kind}.{rule.megatron}"


def _tensors(component: SavedComponent, parameter: Tensor) -> Iterator[tuple[str, Tensor, int, int]]:
    """Parameter and optimizer state: kind, flat tensor, its offset in the parameter, and the index of this replica.

    Without the distributed optimizer every rank with this part of the model has a replica. With it, each has its own
    range.
    """
    trainable, current = component.trainable, component.current
    # Megatron's mark of experts.
    is_expert = not getattr(parameter, "allreduce", True)
    number = trainable.parallel.expert_replica if is_expert else trainable.parallel.replica
    yield "param", _flat(current(parameter)), 0, number
    for optimizer in optimizers(trainable):
        main, start, replica = main_parameter(optimizer, parameter), 0, number
        if main is None:
            continue
        if isinstance(optimizer, DistributedOptimizer):
            start, replica = optimizer._get_model_param_range_map(parameter)["param"].start, 0
        state = optimizer.optimizer.state[main]
        yield "exp_avg", _flat(current(state["exp_avg"])), start, replica
        yield "exp_avg_sq", _flat(current(state["exp_avg_sq"])), start, replica
        if main.dtype != parameter.dtype:
            yield "master", _flat(current(main)), start, replica


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


@dataclass(frozen=True)
class _Place:
    """Place of this rank's part in the full parameter, in the canonical layout."""

    local_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tp_replica: int
    # 1 for the last stage's copy of an embedding that is also the output head.
    stage_replica: int
    # The number of padding rows depends on the tensor-parallel size. They and their optimizer state are zero.
    padded: bool

    @staticmethod
    def of(rule: Rule, parameter: Tensor, parallel: Parallel) -> _Place:
        local = tuple(canonical_shard(parameter.detach(), rule).shape)
        full, offset = list(local), [0] * len(local)
        cuts = rule.cuts(parallel)
        for cut in cuts:
            full[cut.axis] *= cut.size
            offset[cut.axis] = cut.rank * local[cut.axis]
        exported = sum(math.prod(shape) for shape in hf_shapes(rule, parameter, parallel))
        return _Place(
            local_shape=local,
            full_shape=tuple(full),
            offset=tuple(offset),
            tp_replica=0 if cuts else parallel.tp_rank,
            # Megatron's mark.
            stage_replica=int(getattr(parameter, "shared", False)),
            padded=exported < math.prod(full),
        )

    def pieces(self, key: str, flat: Tensor, start: int, replica: int) -> Iterator[ShardedTensor]:
        """Boxes of the full tensor that make up ``flat``, which begins at element ``start`` of this rank's part."""
        position = 0
        for corner, sizes in _boxes(start, start + flat.numel(), self.local_shape):
            numel = math.prod(sizes)
            yield ShardedTensor(
                key=key,
                data=flat[position : position + numel].view(sizes),
                dtype=flat.dtype,
                local_shape=sizes,
                global_shape=self.full_shape,
                global_offset=tuple(a + b for a, b in zip(corner, self.offset, strict=True)),
                axis_fragmentations=None,
                replica_id=(self.stage_replica, self.tp_replica, replica),
                allow_shape_mismatch=self.padded,
            )
            position += numel


def _boxes(start: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Contiguous boxes (corner, sizes) that make up elements ``start`` to ``end`` of a row-major array, in order.

    There are at most ``2 * len(shape) - 1``: part of a first row, whole rows, part of a last row, recursively.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row_numel = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row_numel), end // row_numel
    if first_whole > end_whole:
        yield from _boxes_of_row(end_whole, start, end, shape)
        return
    yield from _boxes_of_row(first_whole - 1, start, first_whole * row_numel, shape)
    if first_whole < end_whole:
        yield (first_whole, *[0] * (len(shape) - 1)), (end_whole - first_whole, *shape[1:])
    yield from _boxes_of_row(end_whole, end_whole * row_numel, end, shape)


def _boxes_of_row(
    row: int, start: int, end: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    row_start = row * math.prod(shape[1:])
    for corner, sizes in _boxes(start - row_start, end - row_start, shape[1:]):
        yield (row, *corner), (1, *sizes)
