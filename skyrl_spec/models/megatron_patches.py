"""Fixes for faults of Megatron-core 0.16 to 0.19. One function fixes one fault.

Some fixes are for CPU, because Megatron assumes CUDA in a few places. They can go when it takes the device from the
parameters or from an accelerator API. Others bridge differences between versions. Each says when it can go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import nn
from torch.distributed import checkpoint
from torch.overrides import TorchFunctionMode

# Megatron's own, which ``uneven_parts_on_gloo`` replaces.
_GATHER, _REDUCE_SCATTER = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim


def _require(owner: Any, names: Sequence[str], fix: Callable[..., Any]) -> None:
    """Raises RuntimeError if a patched name is gone: the fix must then be reviewed. ``owner``: a module or class."""
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(f"{owner.__name__}.{name} is gone: fix {fix.__module__}.{fix.__name__}")


class CudaMeansCpu(TorchFunctionMode):
    """Context in which ``device="cuda"`` means CPU, ``Tensor.cuda()`` does nothing and ``Tensor.type()`` names CUDA.

    Megatron allocates flags and norms with ``device="cuda"``, and groups parameters by ``"torch.cuda.FloatTensor"``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class NoForkRngTracker:
    """Replacement for the CUDA RNG tracker, whose states need a CUDA device.

    No forward pass draws random numbers (dropout is 0) and weights come from a checkpoint, so a fork of the RNG has no
    effect.
    """

    def is_initialized(self) -> bool:
        return True

    def add(self, name: str, seed: int) -> None:
        pass

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        pass

    @contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield


def current_device_is_cpu() -> None:
    """Makes ``torch.cuda.current_device()`` return the CPU, where Megatron then allocates its buffers."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def replace_rng_tracker() -> None:
    """Installs ``NoForkRngTracker``: the CUDA tracker asks a CUDA device for its state."""
    names = ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED")
    _require(megatron_random, names, replace_rng_tracker)
    megatron_random._CUDA_RNG_STATE_TRACKER = NoForkRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def recompute_keeps_cpu_rng_alone() -> None:
    """Makes recompute save and restore only the CPU generator: there is no CUDA generator to ask.

    Can go when Megatron's recompute skips CUDA states on a machine without CUDA.
    """

    def get_states() -> tuple[torch.Tensor, None, dict[str, torch.Tensor]]:
        return torch.get_rng_state(), None, {}

    def set_states(cpu_state: torch.Tensor, _cuda_state: None, _tracker_states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(cpu_state)

    _require(megatron_random, ("_get_all_rng_states", "_set_all_rng_states"), recompute_keeps_cpu_rng_alone)
    megatron_random._get_all_rng_states, megatron_random._set_all_rng_states = get_states, set_states


def norm_recompute_without_fp8() -> None:
    """Makes the recompute of norms work without Transformer Engine.

    ``CheckpointWithoutOutput`` takes ``fp8 is not None`` for fp8, and has the default False. Can go when the default is
    None.
    """
    init = megatron_random.CheckpointWithoutOutput.__init__
    if init.__defaults__ not in ((False,), (None,)):
        raise RuntimeError(
            "megatron.core.tensor_parallel.random.CheckpointWithoutOutput has other arguments: "
            "fix skyrl_spec.models.megatron_patches.norm_recompute_without_fp8"
        )
    init.__defaults__ = (None,)


def router_without_transformer_engine() -> None:
    """Makes the router's product find out that Transformer Engine is missing. 0.16 asks for a name it did not define.

    Can go with Megatron 0.16.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def expert_counts_are_on_cpu() -> None:
    """Makes the dispatcher of tokens take counts as they are, without a CUDA stream that would bring them here.

    Can go when it makes its CUDA stream on a CUDA device only.
    """

    def no_copy(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        for name in ("input_splits", "output_splits"):
            if isinstance(counts := getattr(self, name), torch.Tensor):
                setattr(self, name, counts.tolist())
        return tokens_per_expert

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    _require(dispatcher, ("cuda_dtoh_stream", "_maybe_dtoh_and_synchronize"), expert_counts_are_on_cpu)
    dispatcher.cuda_dtoh_stream = object()
    dispatcher._maybe_dtoh_and_synchronize = no_copy


def uneven_parts_on_gloo() -> None:
    """Makes ranks exchange parts of different lengths, which NCCL does and gloo refuses.

    Experts that several ranks share need it. Can go when gloo takes tensors of different lengths.
    """
    if mappings._gather_along_first_dim is not _GATHER:
        return

    def gather_uneven(part: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return _GATHER(part, group, None, *args)
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = _GATHER(padded, group).unflatten(0, (len(sizes), -1))
        return torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)])

    def reduce_uneven(whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return _REDUCE_SCATTER(whole, group, None, *args)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_uneven, reduce_uneven


def prepare(device: torch.device) -> None:
    """Applies the fixes for ``device``. Call it once per process, before Megatron builds anything."""
    norm_recompute_without_fp8()
    router_without_transformer_engine()
    if device.type == "cpu":
        current_device_is_cpu()
        replace_rng_tracker()
        recompute_keeps_cpu_rng_alone()
        expert_counts_are_on_cpu()
        uneven_parts_on_gloo()
    else:
        megatron_random.model_parallel_cuda_manual_seed(0)


@contextmanager
def no_current_stream() -> Iterator[None]:
    """Context in which ``torch.cuda.current_stream()`` is None.

    Megatron 0.19 asks for the stream before it reduces gradients, and uses it only for gradients of CUDA graphs.
    """
    real = torch.cuda.current_stream
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_stream = real


@contextmanager
def groups_of_this_rank() -> Iterator[None]:
    """Context in which Megatron's optimizer takes this rank's parameter groups for those of all ranks.

    It compares them over all ranks of the world, but a module of one pipeline stage has no optimizer on the others. Can
    go when Megatron compares them over the ranks of the optimizer.
    """
    real = torch.distributed.all_gather_object

    def all_like_this(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    torch.distributed.all_gather_object = all_like_this  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.distributed.all_gather_object = real


@contextmanager
def megatron_device(device: torch.device) -> Iterator[None]:
    """Context for every call into Megatron that allocates or reduces: building, schedules, optimizer steps."""
    if device.type == "cpu":
        with CudaMeansCpu(), no_current_stream():
            yield
    else:
        yield


def save_sharded(sharded: dict[str, ShardedTensor], directory: Path, group: Any = None) -> None:
    """Writes sharded tensors as ``dist_checkpointing.save`` does, but in this process, with PyTorch's writer.

    ``group``: a process group of all ranks, in which they agree on the files. None: the default group.

    Megatron's writer synchronizes CUDA, starts a manager process (which imports the main module again) and forks
    writers. A Ray actor has threads, and a fork may copy a lock that one of them holds. Can go when Megatron writes
    without a fork.
    """
    names = ("_replace_state_dict_keys_with_sharded_keys", "mcore_to_pyt_state_dict", "MCoreSavePlanner")
    _require(torch_dist, names, save_sharded)
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    checkpoint.save(
        torch_dist.mcore_to_pyt_state_dict(by_key),
        storage_writer=_ShardWriter(directory, sync_files=True),
        planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )


class _ShardWriter(checkpoint.FileSystemWriter):
    """Writer that raises the file's own error. ``torch.save`` hides it behind an error of its zip format."""

    def write_data(self, plan: checkpoint.SavePlan, planner: checkpoint.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


# Attribute of an MTP layer that holds its transformer layer: in 0.16, and since 0.17.
_MTP_LAYER_NAMES = ("transformer_layer", "mtp_model_layer")


def mtp_transformer_layer(mtp_layer: nn.Module) -> Any:
    """Transformer layer inside ``mtp_layer``. Can go with Megatron 0.16, which names it differently."""
    for name, module in mtp_layer.named_children():
        if name in _MTP_LAYER_NAMES:
            return module
    raise RuntimeError(
        f"megatron-core {version('megatron-core')}: an MTP layer has none of {', '.join(_MTP_LAYER_NAMES)} "
        f"(it has: {', '.join(name for name, _ in mtp_layer.named_children())}): "
        "fix skyrl_spec.models.megatron_patches.mtp_transformer_layer"
    )


def canonical_name(name: str) -> str:
    """Name of a parameter in ``conversion`` and in checkpoints, equal for all Megatron versions.

    It is the name of 0.16. Megatron's own checkpoints keep it too (``MultiTokenPredictionLayer.sharded_state_dict``).
    Stays as long as checkpoints with these names are read.
    """
    old, new = _MTP_LAYER_NAMES
    return name.replace(f".{new}.", f".{old}.")


def name_in_model(module: nn.Module, name: str) -> str:
    """``canonical_name`` of a parameter of ``module``, in the whole model if that is a pipeline stage."""
    whole_name: Callable[[str], str] = getattr(module, "whole_name", lambda name: name)
    return whole_name(canonical_name(name))


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of ``module`` by ``name_in_model``."""
    return {name_in_model(module, name): parameter for name, parameter in module.named_parameters()}
