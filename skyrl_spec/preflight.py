"""What can go wrong with model, data, devices and accounts, found out before any process starts.

Reads headers and rows only and imports no torch, so that a mistake is answered within seconds.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from safetensors import SafetensorError, safe_open

from skyrl_spec.config import Config, ConfigError
from skyrl_spec.data.dataset import read_rows, row_id
from skyrl_spec.draft_spec import DflashSpec, dflash_tensor_shapes, parse_dflash_spec, plan_dflash, read_dflash_spec
from skyrl_spec.envs.registry import check_env_class, register_custom
from skyrl_spec.model_spec import ModelSpec, load_spec, mtp_tensor_shapes, parse_spec, read_config, tensor_shapes
from skyrl_spec.validation import parallel_layout

_MODEL = "trainer.policy.model.path"
_DRAFT = "trainer.dflash.path"
# What the CPU attention of vLLM can handle.
CPU_HEAD_DIM_MULTIPLE = 32
HUB_TIMEOUT_S = 5.0


def preflight(config: Config, *, may_lack_mtp_head: bool = False) -> None:
    """Raises ``ConfigError`` for the first thing outside the configuration that does not fit it."""
    _check_run_dir(config.trainer.run_dir)
    _check_machine(config)
    spec = _read_spec(config.trainer.policy.model.path)
    _check_parallel_sizes(config, spec)
    _check_lengths(config, spec)
    _check_tensors(config.trainer.policy.model.path, _MODEL, tensor_shapes(spec))
    if config.trainer.mtp.enabled and not may_lack_mtp_head:
        _check_mtp_head(config.trainer.policy.model.path, spec)
    if config.trainer.dflash.enabled:
        _check_dflash(config, spec)
    register_custom(config.environment.custom)
    check_env_class(config.environment.env_class, config.environment.custom)
    for setting, paths in (("data.train_data", config.data.train_data), ("data.val_data", config.data.val_data)):
        for path in paths:
            if paths.count(path) > 1:
                raise ConfigError(f"{setting}={path}: is named twice; name it once, and raise trainer.epochs for more")
            _check_rows(setting, path, config.environment.custom)


def _check_run_dir(run_dir: str) -> None:
    """The directory, or the nearest one above it that exists, can be written to."""
    path = Path(run_dir).absolute()
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise ConfigError(f"trainer.run_dir={run_dir}: {existing} is a file, not a directory; choose another")
        # Tried: modes do not tell what a read-only or full file system refuses.
        with TemporaryDirectory(dir=existing) as folder:
            Path(folder, path.name).write_bytes(b".")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"trainer.run_dir={run_dir}: cannot be written ({reason}); choose another place") from None


def _check_machine(config: Config) -> None:
    """A plan may be made on another machine than the run is for."""
    for check in (_check_wandb, _check_device):
        try:
            check(config)
        except ConfigError as error:
            if not config.trainer.dry_run:
                raise
            print(f"skyrl-spec: warning: not on this machine: {error}", file=sys.stderr)


def _check_wandb(config: Config) -> None:
    """wandb asks for a key on the terminal where it finds none, and so would hang a run."""
    environment = os.environ
    if "wandb" not in config.trainer.logger or environment.get("WANDB_API_KEY"):
        return
    if environment.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    if not _has_netrc_entry(urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""):
        raise ConfigError(
            "trainer.logger=wandb: no account is set up; set WANDB_API_KEY or WANDB_MODE=offline, "
            "run `wandb login`, or take wandb out of trainer.logger"
        )


def _has_netrc_entry(host: str) -> bool:
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _check_device(config: Config) -> None:
    """With RAY_ADDRESS set the GPUs may be on other machines; Ray's placement answers then."""
    if config.trainer.placement.device != "cuda" or "RAY_ADDRESS" in os.environ:
        return
    found, engine = num_gpus(), config.generator.inference_engine
    if found == 0:
        raise ConfigError(
            "trainer.placement.device=cuda: no CUDA device is visible on this machine; "
            "set it to cpu, mend the driver or CUDA_VISIBLE_DEVICES, or join a cluster with RAY_ADDRESS"
        )
    num_workers, num_engine_gpus = parallel_layout(config).world_size, engine.num_engines * engine.tensor_parallel_size
    if config.trainer.placement.colocate_all:
        if num_workers > found:
            raise ConfigError(
                f"trainer.placement.colocate_all=true: {num_workers} policy workers, each with an engine on its GPU, "
                f"but this machine has {found} GPUs; lower trainer.placement.policy_num_gpus_per_node and "
                "generator.inference_engine.num_engines, or join a cluster with RAY_ADDRESS"
            )
    elif num_workers + num_engine_gpus > found:
        raise ConfigError(
            f"trainer.placement.device=cuda: {num_workers} policy workers and {num_engine_gpus} GPUs of engines, but "
            f"this machine has {found}; lower trainer.placement.policy_num_gpus_per_node or "
            "generator.inference_engine.num_engines, or join a cluster with RAY_ADDRESS"
        )


def num_gpus() -> int:
    """Of this machine, as far as this process may see them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return 0 if visible in ("", "-1", "NoDevFiles") else len(visible.split(","))
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=10, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _read_spec(path: str) -> ModelSpec:
    """Of a hub name only config.json is read; the weights follow when the run starts."""
    if Path(path).exists() or not _is_hub_name(path):
        return load_spec(path)
    return parse_spec(Path(path), _hub_config(path, _MODEL))


def _is_hub_name(path: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None


def _hub_config(name: str, setting: str) -> dict[str, Any]:
    """config.json from the hub's cache, else asked for once: the hub's client itself would retry for half a minute."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return read_config(Path(cached).parent)
    request = Request(hf_hub_url(name, "config.json"), headers=build_hf_headers())
    try:
        with urlopen(request, timeout=HUB_TIMEOUT_S) as reply:
            return json.load(reply)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}={name}: neither a local directory nor found on the Hugging Face hub "
            f"({str(error).splitlines()[0]}); correct it or check the network"
        ) from error


def _check_parallel_sizes(config: Config, spec: ModelSpec) -> None:
    engine_tp = config.generator.inference_engine.tensor_parallel_size
    layouts = (
        ("trainer.policy.megatron_config.tensor_model_parallel_size", parallel_layout(config).tp),
        ("generator.inference_engine.tensor_parallel_size", engine_tp),
    )
    for setting, tp in layouts:
        for count, what in (
            (spec.num_heads, "attention heads"),
            (spec.num_kv_heads, "key-value heads"),
            (spec.ffn_hidden_size, "feed-forward columns"),
        ):
            if count % tp != 0:
                raise ConfigError(
                    f"{setting}={tp}: must divide the model's {count} {what}; choose a divisor of {count}"
                )
    if config.trainer.placement.device == "cpu" and spec.head_dim % CPU_HEAD_DIM_MULTIPLE != 0:
        raise ConfigError(
            f"{_MODEL}={config.trainer.policy.model.path}: head_dim {spec.head_dim} is no multiple of "
            f"{CPU_HEAD_DIM_MULTIPLE}, which CPU engines need; use another model or trainer.placement.device=cuda"
        )


def _check_lengths(config: Config, spec: ModelSpec) -> None:
    prompt, limit = config.trainer.max_prompt_length, spec.max_position_embeddings
    for name in ("sampling_params", "eval_sampling_params"):
        sampling = (
            config.generator.sampling_params if name == "sampling_params" else config.generator.eval_sampling_params
        )
        if prompt + sampling.max_generate_length > limit:
            raise ConfigError(
                f"generator.{name}.max_generate_length={sampling.max_generate_length}: with "
                f"trainer.max_prompt_length={prompt} it passes the model's {limit} positions; "
                f"their sum must be at most {limit}: lower one"
            )


def _check_mtp_head(path: str, spec: ModelSpec) -> None:
    def refuse(reason: str) -> ConfigError:
        return ConfigError(
            f"trainer.mtp.enabled=true: the model {path} {reason}; "
            "use a model with an MTP head or trainer.mtp.enabled=false"
        )

    if spec.num_mtp_layers == 0:
        raise refuse("has no MTP head (num_nextn_predict_layers is missing or 0 in its config.json)")
    if spec.architecture != "MiMoForCausalLM":
        raise refuse(f"is a {spec.architecture}, whose MTP head is not supported (MiMoForCausalLM's is)")
    # A hub name's weights are not here yet.
    if Path(path).is_dir() and not any(".mtp_layers." in name for name, _ in _tensors(Path(path), _MODEL)):
        raise refuse("has no tensor named *.mtp_layers.* in its *.safetensors")
    _check_tensors(path, _MODEL, mtp_tensor_shapes(spec))


def _check_dflash(config: Config, spec: ModelSpec) -> None:
    path = config.trainer.dflash.path
    found = None if path is None else _read_dflash_spec(path)
    draft = plan_dflash(config, spec, found)
    tp = parallel_layout(config).tp
    if draft.layers.num_heads % tp or draft.layers.num_kv_heads % tp or draft.layers.ffn_hidden_size % tp:
        raise ConfigError(
            f"trainer.policy.megatron_config.tensor_model_parallel_size={tp}: must divide the draft's "
            f"{draft.layers.num_heads} heads, {draft.layers.num_kv_heads} key-value heads and "
            f"{draft.layers.ffn_hidden_size} feed-forward columns; choose a divisor"
        )
    if path is not None:
        _check_tensors(path, _DRAFT, dflash_tensor_shapes(draft))


def _read_dflash_spec(path: str) -> DflashSpec:
    """As ``_read_spec``: of a hub name only config.json."""
    if Path(path).exists() or not _is_hub_name(path):
        return read_dflash_spec(path)
    return parse_dflash_spec(Path(path), _hub_config(path, _DRAFT))


def _check_tensors(path: str, setting: str, expected: dict[str, tuple[int, ...]]) -> None:
    """That a checkpoint directory has them, in these shapes; of a hub name the weights are not here yet."""
    if not Path(path).is_dir():
        return
    found = dict(_tensors(Path(path), setting))
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(f"{setting}={path}: has no tensor {name}; the checkpoint is incomplete, copy it again")
        if found[name] != shape:
            raise ConfigError(
                f"{setting}={path}: {name} is {list(found[name])}, by config.json it should be {list(shape)}; "
                "the weights are not those of this config.json, copy both again"
            )


def _tensors(directory: Path, setting: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, from the headers of ``*.safetensors``."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{setting}={directory}: has no *.safetensors; give a complete checkpoint directory")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                    yield name, tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{setting}={directory}: {file.name} cannot be read ({error}); copy it again") from error


def _check_rows(setting: str, path: str, custom: dict[str, str]) -> None:
    """Every row can be read, names an environment there is, and has an id of its own if it has one."""
    seen: set[str] = set()
    rows_by_id: dict[str, int] = {}
    for number, row in enumerate(read_rows(path, setting=setting), start=1):
        uid = row_id(row)
        if uid is not None and rows_by_id.setdefault(uid, number) != number:
            raise ConfigError(
                f"{setting}={path}: row {number} has the extra_info.index of row {rows_by_id[uid]} ({uid}); "
                "drop the repetition, or number the rows anew"
            )
        env_class = row.get("env_class")
        if env_class is not None and env_class not in seen:
            check_env_class(env_class, custom, setting=f"{setting}={path}: row {number}: env_class")
            seen.add(env_class)
