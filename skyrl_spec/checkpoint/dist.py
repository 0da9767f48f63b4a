"""Save and load of the trained components, in Megatron's distributed checkpoint format. Both are collective.

Files. A checkpoint has Megatron's files (``.metadata``, ``*.distcp``, ``metadata.json``, ``common.pt``), one
``rank_dpI_tpJ.safetensors`` per rank with its RNG states (with ``_cpK`` for ranks that share packs with the first, and
``_ppL`` for stages that are L before the last), and ``checkpoint.json``. The latter holds everything that is
small and equal on all ranks: step counts, schedules, the caller's ``extra``, and names and shapes for checks.

Tensors. Parameters, Adam moments and fp32 masters are cut by the rules that also load and export weights
(``models.conversion.Rule``). In the canonical layout of a rule, tensor parallelism cuts one axis. Megatron's own
``sharded_state_dict`` is not used, for three reasons:

- A module list inside a draft has no ``sharded_state_dict``. Megatron then treats its tensor-parallel layers as
  replicated and silently keeps rank 0's part only.
- Megatron's reshardable format of the distributed optimizer gathers all moments of a data-parallel group on one rank,
  and every rank holds them all during a load. Here each rank writes and reads only its own range (``pieces``).
- Megatron's optimizers write different keys, so a run could not change ``use_distributed_optimizer``. Here it can.

Load. Parameters, moments, masters and step counts come from the checkpoint. Learning rates, betas and the shape of the
schedule come from the settings. With the same settings, a resumed run is bitwise equal to an uninterrupted one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from skyrl_spec.checkpoint import folders
from skyrl_spec.checkpoint.optimizer_state import initialize_optimizer, optimizer_steps, set_steps
from skyrl_spec.checkpoint.pieces import SavedComponent, main_replicas, sharded, tensor_key
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.conversion import Rule, hf_shapes
from skyrl_spec.models.dtypes import DTYPES
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.types import Component

T = TypeVar("T")

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TORCH_RNG = "torch"


@dataclass(frozen=True)
class Loaded:
    """Data that a checkpoint holds for its caller."""

    extra: dict[str, Any]
    # Empty if the checkpoint has no file for this rank.
    per_rank: dict[str, Tensor]


def save(
    directory: Path,
    components: Mapping[Component, SavedComponent],
    extra: dict[str, Any],
    per_rank: dict[str, Tensor] | None = None,
    parallel: Parallel | None = None,
) -> None:
    """Writes ``components`` to ``directory`` (named ``step_N``), which appears when it is complete.

    Args:
        extra: plain data for JSON, equal on all ranks.
        per_rank: small tensors of this rank, such as states of generators. torch's CPU generator is always saved.
        parallel: that of the components. Needed on a pipeline stage that has none.

    Raises:
        RunError: it could not be written. Raised on all ranks; earlier checkpoints are untouched.
    """
    save, error = Save(directory, components, extra, per_rank, parallel), None
    try:
        save.write()
    except (OSError, CheckpointException) as raised:
        error = raised
    save.end(error)


class Save:
    """A checkpoint that is being written. ``write`` may run in another thread, the rest is for the one that trains."""

    def __init__(
        self,
        directory: Path,
        components: Mapping[Component, SavedComponent],
        extra: dict[str, Any],
        per_rank: dict[str, Tensor] | None = None,
        parallel: Parallel | None = None,
        *,
        copies: bool = False,
    ):
        """Makes the directory, and takes what is written. Collective. ``copies``: the tensors may change meanwhile.

        Raises:
            RunError: nothing can be written there.
        """
        self._directory = directory
        self._parallel = parallel = parallel or _parallel(components)
        for component in components.values():
            initialize_optimizer(component.trainable)
        self._tensors = main_replicas(sharded(components), copies=copies)
        parts = _of_all_stages(_describe(components), parallel)
        self._record = {"layout": _layout(parallel), "parts": parts, "extra": extra}
        with self._plain_errors():
            _together(lambda: folders.begin(directory) if self._parallel.rank == 0 else None)
            partial = folders.partial(directory)
            _together(lambda: _write_small_files(partial, self._parallel, per_rank or {}))

    def write(self, group: Any = None) -> None:
        """Writes the tensors. Collective in ``group``. Once all ranks have written, the checkpoint appears.

        Raises torch's exception on all ranks if one of them cannot write, and rank 0's if it cannot publish.
        """
        megatron_patches.save_sharded(self._tensors, folders.partial(self._directory), group)
        if self._parallel.rank == 0:
            folders.publish(self._directory, self._record)

    def end(self, error: BaseException | None) -> None:
        """Waits until the checkpoint is there. Collective. ``error``: what ``write`` raised on this rank.

        Raises:
            RunError: it could not be written. Raised on all ranks.
        """
        self._tensors = {}
        with self._plain_errors():
            _together(lambda: _raise(error))

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turns errors of files into one line, and removes what was written."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            if self._parallel.rank == 0:
                folders.discard(self._directory)
            raise RunError(
                f"{self._directory}: the checkpoint could not be written ({reason(error)}); earlier ones are as they "
                "were; free space, or set trainer.run_dir to another place"
            ) from None


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def load(directory: Path, components: Mapping[Component, SavedComponent], parallel: Parallel | None = None) -> Loaded:
    """Loads ``components`` in place and sets torch's CPU generator. ``directory`` may hold more components.

    The parallel layout may differ from the layout of the save. Then per-rank states come from the first rank of the
    replica with the same data-parallel index, so that they are equal within a replica. A
    data-parallel index that the save did not have keeps its present state.

    Raises:
        ConfigError: the checkpoint is incomplete or unreadable, or a component is missing or of another model or dtype.
            Raised on all ranks, before any change, except that an unreadable file may leave components half loaded.
    """
    parallel = parallel or _parallel(components)
    here = _of_all_stages(_identities(components), parallel)
    record = _together(lambda: _check(directory, here))
    for component in components.values():
        initialize_optimizer(component.trainable)
    try:
        dist_checkpointing.load(sharded(components), str(directory))
    except (CheckpointException, CheckpointingException) as error:
        raise ConfigError(
            f"trainer.resume_path={directory}: cannot be read ({reason(error)}); resume from another checkpoint"
        ) from None
    for name, component in components.items():
        saved = record["parts"][name]
        set_steps(component.trainable, saved["optimizer_steps"], saved["scheduler"]["num_steps"])
    per_rank = _together(lambda: _read_per_rank(directory, parallel, record["layout"]))
    if per_rank:
        torch.set_rng_state(per_rank.pop(_TORCH_RNG))
    return Loaded(record["extra"], per_rank)


def read_parameters(directory: Path, name: str, rules: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    """HF names and tensors of component ``name``, one parameter at a time, without a model or other ranks."""
    reader = FileSystemReader(directory)
    stored = reader.read_metadata().state_dict_metadata
    for rule in rules:
        key = tensor_key(name, "param", rule)
        described = stored[key]
        assert isinstance(described, TensorStorageMetadata)
        full = torch.empty(described.size, dtype=described.properties.dtype)
        checkpoint.load({key: full}, storage_reader=reader, no_dist=True)
        yield from zip(rule.hf, rule.from_canonical(full), strict=True)


def _parallel(components: Mapping[Component, SavedComponent]) -> Parallel:
    return next(iter(components.values())).trainable.parallel


def _layout(parallel: Parallel) -> dict[str, int]:
    return {"tp": parallel.tp_size, "cp": parallel.cp_size, "pp": parallel.pp_size, "dp": parallel.dp_size}


def _together(step: Callable[[], T]) -> T:
    """Runs ``step`` on every rank. An error on one rank is raised on all of them."""
    local_error, result = None, None
    try:
        result = step()
    except (OSError, ConfigError, CheckpointException) as error:
        local_error = error
    for error_of_rank in on_all_ranks(local_error):
        if error_of_rank is not None:
            raise error_of_rank
    return result  # type: ignore[return-value]


def on_all_ranks(value: T) -> list[T]:
    """``value`` of every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def reason(error: BaseException) -> str:
    """One line about an error. For torch's exception over all ranks, the error of the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


# ---- Small files and checks ------------------------------------------------------------------------------------------


def _write_small_files(partial: Path, parallel: Parallel, per_rank: dict[str, Tensor]) -> None:
    assert _TORCH_RNG not in per_rank
    states = {_TORCH_RNG: torch.get_rng_state(), **{name: tensor.cpu() for name, tensor in per_rank.items()}}
    data = safetensors.torch.save(states)
    folders.write_synced(_per_rank_file(partial, parallel, _layout(parallel)), data)
    if parallel.rank == 0:
        # Megatron's loader requires both files. They hold no data.
        empty_state = io.BytesIO()
        torch.save({}, empty_state)
        folders.write_synced(partial / COMMON_STATE_FNAME, empty_state.getvalue())
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))


def _per_rank_file(directory: Path, parallel: Parallel, layout: dict[str, int]) -> Path:
    """This rank's file in a checkpoint of ``layout``."""
    tp_rank = parallel.tp_rank if layout["tp"] == parallel.tp_size else 0
    # Older checkpoints do not know them.
    cp_rank = parallel.cp_rank if layout.get("cp", 1) == parallel.cp_size else 0
    stages_behind = parallel.pp_size - 1 - parallel.pp_rank if layout.get("pp", 1) == parallel.pp_size else 0
    others = "".join(f"_{name}{number}" for name, number in (("cp", cp_rank), ("pp", stages_behind)) if number)
    return directory / f"rank_dp{parallel.dp_rank}_tp{tp_rank}{others}.safetensors"


def _read_per_rank(directory: Path, parallel: Parallel, layout: dict[str, int]) -> dict[str, Tensor]:
    path = _per_rank_file(directory, parallel, layout)
    try:
        return safetensors.torch.load_file(path) if path.exists() else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"trainer.resume_path={directory}: {path.name} cannot be read ({error}); resume from another checkpoint"
        ) from None


def _of_all_stages(described: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """The description of whole components, from those that each rank gives of its pipeline stage. Collective."""
    merged: dict[str, Any] = {}
    for of_rank in on_all_ranks(described) if parallel.pp_size > 1 else [described]:
        for name, part in of_rank.items():
            known = merged.setdefault(name, part)
            merged[name] = known | {"shapes": known["shapes"] | part["shapes"]}
    return merged


def _identities(components: Mapping[Component, SavedComponent]) -> dict[str, Any]:
    """Names, shapes and types that a load checks."""
    return {
        name: {"dtypes": sorted(_dtypes(component)), "shapes": _shapes(component)}
        for name, component in components.items()
    }


def _describe(components: Mapping[Component, SavedComponent]) -> dict[str, Any]:
    """``_identities``, and counters that a load sets."""
    identities = _identities(components)
    return {
        name: identities[name]
        | {
            "optimizer_steps": optimizer_steps(component.trainable),
            "scheduler": component.trainable.scheduler.state_dict(),
        }
        for name, component in components.items()
    }


def _dtypes(component: SavedComponent) -> set[str]:
    return {_DTYPE_NAMES[parameter.dtype] for parameter in component.trainable.module.parameters()}


def _shapes(component: SavedComponent) -> dict[str, list[int]]:
    """Shapes of the full tensors, by HF name."""
    parameters = megatron_patches.named_parameters(component.trainable.module)
    return {
        name: list(shape)
        for rule in component.rules
        for name, shape in zip(
            rule.hf, hf_shapes(rule, parameters[rule.megatron], component.trainable.parallel), strict=True
        )
    }


def _check(directory: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Record of the checkpoint, checked against the components of this run."""
    record = folders.read_record(directory)
    _check_index(directory)
    setting, saved_components = f"trainer.resume_path={directory}", record["parts"]
    for name, part in described.items():
        if name not in saved_components:
            raise ConfigError(
                f"{setting}: holds no {name} (it has: {', '.join(sorted(saved_components))}); "
                f"resume without the {name}, or from another checkpoint"
            )
        saved, shapes = saved_components[name], part["shapes"]
        if saved["shapes"] != shapes:
            differing = sorted(
                key for key in saved["shapes"].keys() | shapes if saved["shapes"].get(key) != shapes.get(key)
            )
            key = differing[0]
            raise ConfigError(
                f"{setting}: its {name} is another model than this run's: {key} is "
                f"{saved['shapes'].get(key, 'not there')}, here {shapes.get(key, 'not there')} "
                f"({len(differing)} tensors differ); set the model it was trained from, or resume from another "
                "checkpoint"
            )
        if saved["dtypes"] != part["dtypes"]:
            raise ConfigError(
                f"{setting}: its {name} was trained in {'+'.join(saved['dtypes'])}, this run is set to "
                f"{'+'.join(part['dtypes'])}; set trainer.policy.megatron_config.dtype={saved['dtypes'][0]}"
            )
    return record


def _check_index(directory: Path) -> None:
    """Reads the index of tensors in advance, because PyTorch prints a traceback if that fails during a load."""
    try:
        FileSystemReader(directory).read_metadata()
    # A pickle with wrong bytes raises any exception.
    except Exception as error:
        raise ConfigError(
            f"trainer.resume_path={directory}: .metadata cannot be read ({reason(error)}); "
            "resume from another checkpoint"
        ) from None
