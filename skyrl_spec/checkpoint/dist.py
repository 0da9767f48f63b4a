"""Save and load what the ranks train, in Megatron's distributed checkpoint format. All ranks call both together.

What is where. A checkpoint has Megatron's files (``.metadata``, ``*.distcp``, ``metadata.json``, ``common.pt``),
``rank_dpI_tpJ.safetensors`` with the RNG states of each rank, and ``checkpoint.json`` with everything that is small
and equal on all ranks: step counts, schedules, the caller's ``extra``, and names and shapes to check a load against.

How tensors are cut. Parameters, Adam moments and fp32 masters are cut by the table that also reads and exports weights
(``megatron.conversion.Rule``): in its canonical layout tensor parallelism cuts one axis of every parameter. Megatron's
own ``sharded_state_dict`` was looked at and not taken, for three reasons:

- a module list inside a draft of ours has no ``sharded_state_dict``; Megatron then takes its tensor-parallel layers
  for replicated ones and would keep rank 0's part only, without a word;
- its reshardable form of the distributed optimizer gathers all moments of a data-parallel group on one rank, and on a
  load every rank holds them all; here each rank writes and reads just its own range (``_boxes``), into place;
- its optimizers write different keys, so a run could not change ``use_distributed_optimizer``; here it can.

What comes from where on a load. What was trained comes from the checkpoint: parameters, moments, masters, step counts.
What is set comes from the configuration: learning rates, betas, the shape of the schedule. With the same configuration
a resumed run is bitwise the uninterrupted one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from skyrl_spec.checkpoint import folders
from skyrl_spec.config import ConfigError, RunError
from skyrl_spec.megatron import compat
from skyrl_spec.megatron.conversion import Rule, canonical_shard, hf_shapes
from skyrl_spec.megatron.model import DTYPES
from skyrl_spec.megatron.optim import Trainable
from skyrl_spec.megatron.parallel import Parallel
from skyrl_spec.megatron.trainer import PolicyTrainer

T = TypeVar("T")

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TORCH_RNG = "torch"


@dataclass(frozen=True)
class Part:
    """Something that is trained, and how its parameters are cut."""

    trainable: Trainable
    rules: list[Rule]


@dataclass(frozen=True)
class Loaded:
    """What a load gives back to the caller; ``per_rank`` is empty where the checkpoint has nothing for this rank."""

    extra: dict[str, Any]
    per_rank: dict[str, Tensor]


def parts(trainer: PolicyTrainer) -> dict[str, Part]:
    """All that ``trainer`` trains, by name. A caller may save or load some of it."""
    out = {} if trainer.policy is None else {"policy": Part(trainer.policy, trainer.rules)}
    if trainer.draft is not None:
        out["draft"] = Part(trainer.draft.trainable, trainer.draft.draft.rules)
    return out


def save(
    directory: Path, parts: dict[str, Part], extra: dict[str, Any], per_rank: dict[str, Tensor] | None = None
) -> None:
    """Write ``parts`` to ``directory`` (named ``step_N``), which appears under its name when it is complete on disk.

    Args:
        extra: Plain data for JSON, equal on all ranks.
        per_rank: Small tensors of this rank (states of generators). The state of torch's CPU generator is saved anyway.

    Raises:
        RunError: it could not be written; on all ranks, and earlier checkpoints are untouched.
    """
    parallel = _parallel(parts)
    for part in parts.values():
        _initialize_optimizer(part.trainable)
    try:
        _together(lambda: folders.begin(directory) if parallel.rank == 0 else None)
        partial = folders.partial(directory)
        compat.save_sharded(_sharded(parts), partial)
        _together(lambda: _write_small_files(partial, parallel, per_rank or {}))
        record = {"layout": _layout(parallel), "parts": _describe(parts), "extra": extra}
        _together(lambda: folders.publish(directory, record) if parallel.rank == 0 else None)
    except (OSError, CheckpointException) as error:
        if parallel.rank == 0:
            folders.discard(directory)
        raise RunError(
            f"{directory}: the checkpoint could not be written ({reason(error)}); earlier ones are as they were. "
            "Free space, or name another place with trainer.run_dir"
        ) from None


def load(directory: Path, parts: dict[str, Part]) -> Loaded:
    """Read ``parts``, which may be fewer than ``directory`` holds, into place, and set torch's CPU generator.

    The parallel layout may be another than the one of the save. Per-rank states then come from the rank of the same
    data-parallel index and tensor-parallel index 0, so that they are equal within a tensor-parallel group; a
    data-parallel index that was not there keeps the state it has.

    Raises:
        ConfigError: no complete checkpoint, a part is missing, or it is of another model or dtype; on all ranks, and
            before anything was changed. (After a file that cannot be read, parts may be half loaded.)
    """
    parallel = _parallel(parts)
    record = _together(lambda: _check(directory, parts))
    for part in parts.values():
        _initialize_optimizer(part.trainable)
    try:
        dist_checkpointing.load(_sharded(parts), str(directory))
    except (CheckpointException, CheckpointingException) as error:
        raise ConfigError(
            f"trainer.resume_path={directory}: cannot be read ({reason(error)}); resume from another checkpoint"
        ) from None
    for name, part in parts.items():
        described = record["parts"][name]
        _set_steps(part.trainable, described["optimizer_steps"], described["scheduler"]["num_steps"])
    per_rank = _together(lambda: _read_per_rank(directory, parallel, record["layout"]))
    if per_rank:
        torch.set_rng_state(per_rank.pop(_TORCH_RNG))
    return Loaded(record["extra"], per_rank)


def read_parameters(directory: Path, name: str, rules: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Part ``name`` of a checkpoint by HF name, one parameter at a time, without a model or other ranks."""
    reader = FileSystemReader(directory)
    stored = reader.read_metadata().state_dict_metadata
    for rule in rules:
        key = _key(name, "param", rule)
        described = stored[key]
        assert isinstance(described, TensorStorageMetadata)
        full = torch.empty(described.size, dtype=described.properties.dtype)
        checkpoint.load({key: full}, storage_reader=reader, no_dist=True)
        yield from zip(rule.hf, rule.from_canonical(full), strict=True)


def _parallel(parts: dict[str, Part]) -> Parallel:
    return next(iter(parts.values())).trainable.parallel


def _layout(parallel: Parallel) -> dict[str, int]:
    return {"tp": parallel.tp_size, "dp": parallel.dp_size}


def _together(step: Callable[[], T]) -> T:
    """Run a step of this rank's own; if it failed on one rank, its error is raised on all of them."""
    error, result = None, None
    try:
        result = step()
    except (OSError, ConfigError) as raised:
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            raise first
    return result  # type: ignore[return-value]


def reason(error: BaseException) -> str:
    """One line of what went wrong, on whichever rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


# ---- What is saved beside the tensors -------------------------------------------------------------------------------


def _write_small_files(partial: Path, parallel: Parallel, per_rank: dict[str, Tensor]) -> None:
    assert _TORCH_RNG not in per_rank
    states = {_TORCH_RNG: torch.get_rng_state(), **{name: tensor.cpu() for name, tensor in per_rank.items()}}
    data = safetensors.torch.save(states)
    folders.write_synced(_per_rank_file(partial, parallel, _layout(parallel)), data)
    if parallel.rank == 0:
        # Megatron's loader wants both; nothing of ours is in them.
        nothing = io.BytesIO()
        torch.save({}, nothing)
        folders.write_synced(partial / COMMON_STATE_FNAME, nothing.getvalue())
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))


def _per_rank_file(directory: Path, parallel: Parallel, layout: dict[str, int]) -> Path:
    """This rank's file in a checkpoint of ``layout``."""
    tp_rank = parallel.tp_rank if layout["tp"] == parallel.tp_size else 0
    return directory / f"rank_dp{parallel.dp_rank}_tp{tp_rank}.safetensors"


def _read_per_rank(directory: Path, parallel: Parallel, layout: dict[str, int]) -> dict[str, Tensor]:
    path = _per_rank_file(directory, parallel, layout)
    try:
        return safetensors.torch.load_file(path) if path.exists() else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"trainer.resume_path={directory}: {path.name} cannot be read ({error}); resume from another checkpoint"
        ) from None


def _describe(parts: dict[str, Part]) -> dict[str, Any]:
    """What a load checks, and the counters it sets; independent of the parallel layout."""
    return {
        name: {
            "dtypes": sorted(_dtypes(part)),
            "shapes": _shapes(part),
            "optimizer_steps": _optimizer_steps(part.trainable),
            "scheduler": part.trainable.scheduler.state_dict(),
        }
        for name, part in parts.items()
    }


def _dtypes(part: Part) -> set[str]:
    return {_DTYPE_NAMES[parameter.dtype] for parameter in part.trainable.module.parameters()}


def _shapes(part: Part) -> dict[str, list[int]]:
    """Of the full tensors, by HF name."""
    parameters = dict(part.trainable.module.named_parameters())
    return {
        name: list(shape)
        for rule in part.rules
        for name, shape in zip(
            rule.hf, hf_shapes(rule, parameters[rule.megatron], part.trainable.parallel), strict=True
        )
    }


def _check(directory: Path, parts: dict[str, Part]) -> dict[str, Any]:
    """The checkpoint's record, if ``parts`` can be loaded from it."""
    record = folders.read_record(directory)
    _check_index(directory)
    setting, there = f"trainer.resume_path={directory}", record["parts"]
    for name, part in parts.items():
        if name not in there:
            raise ConfigError(
                f"{setting}: holds no {name} (it has: {', '.join(sorted(there))}); "
                f"resume without the {name}, or from another checkpoint"
            )
        saved, shapes = there[name], _shapes(part)
        if saved["shapes"] != shapes:
            other = sorted(
                key for key in saved["shapes"].keys() | shapes if saved["shapes"].get(key) != shapes.get(key)
            )
            raise ConfigError(
                f"{setting}: its {name} is another model than this run's: {other[0]} is "
                f"{saved['shapes'].get(other[0], 'not there')}, here {shapes.get(other[0], 'not there')} "
                f"({len(other)} tensors differ); set the model it was trained from, or resume from another checkpoint"
            )
        if saved["dtypes"] != sorted(_dtypes(part)):
            raise ConfigError(
                f"{setting}: its {name} was trained in {'+'.join(saved['dtypes'])}, this run is set to "
                f"{'+'.join(sorted(_dtypes(part)))}; set trainer.policy.megatron_config.dtype={saved['dtypes'][0]}"
            )
    return record


def _check_index(directory: Path) -> None:
    """Read the index of tensors on its own: within a load, PyTorch prints a traceback beside its error."""
    try:
        FileSystemReader(directory).read_metadata()
    # A pickle of wrong bytes fails in any way.
    except Exception as error:
        raise ConfigError(
            f"trainer.resume_path={directory}: .metadata cannot be read ({reason(error)}); "
            "resume from another checkpoint"
        ) from None


# ---- Tensors --------------------------------------------------------------------------------------------------------


def _sharded(parts: dict[str, Part]) -> dict[str, ShardedTensor]:
    """This rank's pieces of everything, as views: a load writes through them into place."""
    pieces: dict[str, ShardedTensor] = {}
    for name, part in parts.items():
        module = part.trainable.module
        parameters = dict(module.named_parameters())
        # Anything else that has a state would be lost without a word.
        stateful = {key for key, value in module.state_dict().items() if isinstance(value, Tensor)}
        assert stateful <= parameters.keys() == {rule.megatron for rule in part.rules}, stateful ^ parameters.keys()
        for rule in part.rules:
            for kind, flat, start, replica in _tensors(part.trainable, parameters[rule.megatron]):
                place = _Place.of(rule, parameters[rule.megatron], part.trainable.parallel)
                key = _key(name, kind, rule)
                for index, piece in enumerate(place.pieces(key, flat, start, replica)):
                    pieces[f"{key}.{index}"] = piece
    return pieces


def _key(name: str, kind: str, rule: Rule) -> str:
    """Under which a tensor is stored, in the canonical layout: of a part, the parameter or a moment of it."""
    return f"{name}.{kind}.{rule.megatron}"


def _tensors(trainable: Trainable, parameter: Tensor) -> Iterator[tuple[str, Tensor, int, int]]:
    """A parameter and its optimizer state: kind, flat range of it, where the range starts, which copy of it this is.

    Without the distributed optimizer each data-parallel rank has a copy of the state; with it, each has its own range.
    """
    dp_rank = trainable.parallel.dp_rank
    yield "param", _flat(parameter), 0, dp_rank
    for optimizer in _optimizers(trainable):
        main, start, replica = _main_parameter(optimizer, parameter), 0, dp_rank
        if main is None:
            continue
        if isinstance(optimizer, DistributedOptimizer):
            start, replica = optimizer._get_model_param_range_map(parameter)["param"].start, 0
        state = optimizer.optimizer.state[main]
        yield "exp_avg", _flat(state["exp_avg"]), start, replica
        yield "exp_avg_sq", _flat(state["exp_avg_sq"]), start, replica
        if main.dtype != parameter.dtype:
            yield "master", _flat(main), start, replica


def _main_parameter(optimizer: MegatronOptimizer, parameter: Tensor) -> Tensor | None:
    """What the inner optimizer updates in place of ``parameter``; None if that is on another data-parallel rank."""
    if isinstance(optimizer, DistributedOptimizer):
        if parameter not in optimizer.model_param_gbuf_map:
            return None
        group, index = optimizer.model_param_group_index_map[parameter]
        return optimizer.optimizer.param_groups[group]["params"][index]
    # Set on 16-bit parameters alone.
    return parameter.main_param if hasattr(parameter, "main_param") else parameter


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


@dataclass(frozen=True)
class _Place:
    """Where a rank's part of a parameter lies in the full one, in the canonical layout."""

    local_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tp_replica: int
    # Rows were added that depend on the tensor-parallel size; they are zero, and so is their optimizer state.
    padded: bool

    @staticmethod
    def of(rule: Rule, parameter: Tensor, parallel: Parallel) -> _Place:
        local = tuple(canonical_shard(parameter.detach(), rule).shape)
        full, offset = list(local), [0] * len(local)
        if rule.shard_axis is not None:
            full[rule.shard_axis] *= parallel.tp_size
            offset[rule.shard_axis] = parallel.tp_rank * local[rule.shard_axis]
        exported = sum(math.prod(shape) for shape in hf_shapes(rule, parameter, parallel))
        return _Place(
            local_shape=local,
            full_shape=tuple(full),
            offset=tuple(offset),
            tp_replica=parallel.tp_rank if rule.shard_axis is None else 0,
            padded=exported < math.prod(full),
        )

    def pieces(self, key: str, flat: Tensor, start: int, replica: int) -> Iterator[ShardedTensor]:
        """Boxes of the full tensor that together are ``flat``, elements ``start`` and up of this rank's part."""
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
                replica_id=(self.tp_replica, replica),
                allow_shape_mismatch=self.padded,
            )
            position += numel


def _boxes(start: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``start`` to ``end`` of a row-major array as boxes (corner, sizes), in order, each contiguous.

    At most ``2 * len(shape) - 1``: a part of a first row, whole rows, a part of a last one, and so on inside these.
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
    before = row * math.prod(shape[1:])
    for corner, sizes in _boxes(start - before, end - before, shape[1:]):
        yield (row, *corner), (1, *sizes)


# ---- Optimizers -----------------------------------------------------------------------------------------------------


def _optimizers(trainable: Trainable) -> list[MegatronOptimizer]:
    optimizer = trainable.optimizer
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _initialize_optimizer(trainable: Trainable) -> None:
    """Give an optimizer that has not stepped yet the state it would make in its first step: zeros."""
    for optimizer in _optimizers(trainable):
        inner = optimizer.optimizer
        optimizer.init_state_fn(inner, optimizer.config)
        if _counts_per_parameter(inner):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter].setdefault("step", torch.tensor(0.0))


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts in each parameter's state, Transformer Engine's and Apex's in the parameter group."""
    return isinstance(inner, torch.optim.Adam)


def _optimizer_steps(trainable: Trainable) -> int:
    """Updates so far."""
    counts = set()
    for optimizer in _optimizers(trainable):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            if _counts_per_parameter(inner):
                counts |= {int(inner.state[parameter]["step"]) for parameter in group["params"]}
            elif group["params"]:
                counts.add(int(group.get("step", 0)))
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def _set_steps(trainable: Trainable, optimizer_steps: int, schedule_steps: int) -> None:
    for optimizer in _optimizers(trainable):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            if _counts_per_parameter(inner):
                for parameter in group["params"]:
                    # A tensor each: torch counts them up in place.
                    inner.state[parameter]["step"] = torch.tensor(float(optimizer_steps))
            else:
                group["step"] = optimizer_steps
    trainable.scheduler.num_steps = schedule_steps
    # Sets the learning rate that goes with the count.
    trainable.scheduler.step(increment=0)
