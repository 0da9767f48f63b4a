"""Checks of model, data, devices and accounts, made before any process starts.

They read headers and rows only and import no torch, so that a mistake is reported within seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from skyrl_spec.data.dataset import read_rows, row_id
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.envs.registry import check_env_class, register_custom
from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics.dashboards import check_wandb
from skyrl_spec.planning.environment import check_cluster, check_server, cluster_address
from skyrl_spec.settings.derived import max_input_length, parallel_sizes
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.entries import Entries
from skyrl_spec.specs.files import INDEX, POLICY_PATH, read_config, read_config_only, require_tensors, stray_files
from skyrl_spec.specs.model import ModelSpec, parse_spec, require_tied_head, tensor_shapes
from skyrl_spec.specs.stages import Stages

# vLLM's attention on CPU needs a multiple of this.
CPU_HEAD_DIM_MULTIPLE = 32
_MEGATRON = "trainer.policy.megatron_config"


def preflight(config: Config, *, draft_from_scratch: bool = False) -> None:
    """Checks everything outside the configuration that a run needs.

    Raises:
        ConfigError: the first thing that does not fit ``config``.
    """
    path = config.trainer.policy.model.path
    _check_run_dir(config.trainer.run_dir)
    _check_machine(config)
    spec = parse_spec(*read_config_only(path, POLICY_PATH))
    _check_parallel_sizes(config, spec)
    _check_lengths(config, spec)
    require_tensors(path, POLICY_PATH, tensor_shapes(spec))
    require_tied_head(path, spec)
    _say_what_is_odd(path)
    kind = trained_kind(config.trainer)
    if kind is not None:
        kind.preflight(config, spec, from_scratch=draft_from_scratch)
    register_custom(config.environment.custom)
    check_env_class(config.environment.env_class, config.environment.custom)
    for setting, paths in (("data.train_data", config.data.train_data), ("data.val_data", config.data.val_data)):
        for file in paths:
            if paths.count(file) > 1:
                raise ConfigError(
                    f"{setting}={file}: is named twice; name it once, and raise trainer.epochs to repeat it"
                )
            _check_rows(setting, file, config.environment.custom)


def _say_what_is_odd(path: str) -> None:
    """Names entries of config.json that contradict each other, and files of weights that nothing reads."""
    directory = Path(path)
    if not directory.is_dir():
        return
    lines = Entries(read_config(directory), "").contradictions()
    if strays := stray_files(directory, POLICY_PATH):
        lines.append(f"{', '.join(strays)}: not in {INDEX}, so not a part of the model")
    for line in lines:
        print(f"skyrl-spec: {POLICY_PATH}={path}: {line}", file=sys.stderr)


def _check_run_dir(run_dir: str) -> None:
    """Checks that the directory, or its nearest parent that exists, can be written to."""
    path = Path(run_dir).absolute()
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise ConfigError(
                f"trainer.run_dir={run_dir}: {existing} is a file, not a directory; choose another directory"
            )
        # Modes do not show whether the file system is read-only or full, so write a file.
        with TemporaryDirectory(dir=existing) as folder:
            Path(folder, path.name).write_bytes(b".")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"trainer.run_dir={run_dir}: cannot be written to ({reason}); choose another directory"
        ) from None


def _check_machine(config: Config) -> None:
    """Checks account, cluster and devices. In a dry run problems are warnings: it may be meant for another machine."""
    checks: list[Callable[[], None]] = [_check_wandb] if "wandb" in config.trainer.logger else []
    for check in [*checks, check_cluster, lambda: _check_device(config)]:
        try:
            check()
        except ConfigError as error:
            if not config.trainer.dry_run:
                raise
            print(f"skyrl-spec: warning: this machine cannot start the run: {error}", file=sys.stderr)


def _check_wandb() -> None:
    address = check_wandb()
    if address is not None:
        fix = "set WANDB_MODE=offline to log without a server, or remove wandb from trainer.logger"
        check_server(address, "trainer.logger=[wandb]", fix)


def _check_device(config: Config) -> None:
    """Checks the number of GPUs. With RAY_ADDRESS they may be on other machines, and Ray's placement checks them."""
    if config.trainer.placement.device != "cuda" or cluster_address() is not None:
        return
    found, engine = num_gpus(), config.generator.inference_engine
    if found == 0:
        raise ConfigError(
            "trainer.placement.device=cuda: no CUDA device is visible on this machine; "
            "set it to cpu, fix the driver or CUDA_VISIBLE_DEVICES, or join a cluster with RAY_ADDRESS"
        )
    num_workers, num_engine_gpus = parallel_sizes(config).world_size, engine.num_engines * engine.tensor_parallel_size
    if config.trainer.placement.colocate_all:
        if num_workers > found:
            raise ConfigError(
                f"trainer.placement.colocate_all=true: {num_workers} policy workers, each with an engine on its GPU, "
                f"need {num_workers} GPUs, but this machine has {found}; lower "
                "trainer.placement.policy_num_gpus_per_node and generator.inference_engine.num_engines, or join a "
                "cluster with RAY_ADDRESS"
            )
    elif num_workers + num_engine_gpus > found:
        raise ConfigError(
            f"trainer.placement.device=cuda: {num_workers} policy workers and {num_engine_gpus} GPUs of engines need "
            f"{num_workers + num_engine_gpus} GPUs, but this machine has {found}; lower "
            "trainer.placement.policy_num_gpus_per_node or generator.inference_engine.num_engines, or join a cluster "
            "with RAY_ADDRESS"
        )


def num_gpus() -> int:
    """Number of GPUs of this machine that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return 0 if visible in ("", "-1", "NoDevFiles") else len(visible.split(","))
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=10, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _check_parallel_sizes(config: Config, spec: ModelSpec) -> None:
    Stages.of(spec.num_layers, config.trainer.policy.megatron_config)
    engine, sizes = config.generator.inference_engine, parallel_sizes(config)
    _check_experts(config, spec)
    heads = [(spec.num_heads, "attention heads"), (spec.num_kv_heads, "key-value heads")]
    columns, expert = [(spec.ffn_hidden_size, "feed-forward columns")], list[tuple[int, str]]()
    if spec.experts is not None:
        columns, expert = [], [(spec.experts.ffn_hidden_size, "columns of an expert")]
    engine_divides_experts = not engine.engine_init_kwargs.get("enable_expert_parallel", False)
    divided = (
        (f"{_MEGATRON}.tensor_model_parallel_size", sizes.tp, heads + columns),
        (f"{_MEGATRON}.expert_tensor_parallel_size", sizes.expert_tp, expert),
        (
            "generator.inference_engine.tensor_parallel_size",
            engine.tensor_parallel_size,
            heads + columns + (expert if engine_divides_experts else []),
        ),
    )
    for setting, size, counts in divided:
        for count, what in counts:
            if count % size != 0:
                raise ConfigError(f"{setting}={size}: must divide the model's {count} {what}; set a divisor of {count}")
    if config.trainer.placement.device == "cpu" and spec.head_dim % CPU_HEAD_DIM_MULTIPLE != 0:
        raise ConfigError(
            f"{POLICY_PATH}={config.trainer.policy.model.path}: head_dim {spec.head_dim} must be a multiple of "
            f"{CPU_HEAD_DIM_MULTIPLE} on cpu; use another model or trainer.placement.device=cuda"
        )


def _check_experts(config: Config, spec: ModelSpec) -> None:
    megatron, sizes = config.trainer.policy.megatron_config, parallel_sizes(config)
    path = config.trainer.policy.model.path
    if spec.experts is None and config.trainer.algorithm.router_replay:
        raise ConfigError(
            f"trainer.algorithm.router_replay=true: must be false, because {path} has no experts; set it to false, or "
            "use a Qwen3-MoE model"
        )
    if spec.experts is None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(megatron, name) > 1:
                raise ConfigError(
                    f"{_MEGATRON}.{name}={getattr(megatron, name)}: must be 1, because {path} has no experts; set it "
                    "to 1, or use a Qwen3-MoE model"
                )
        return
    if spec.experts.num % sizes.ep:
        raise ConfigError(
            f"{_MEGATRON}.expert_model_parallel_size={sizes.ep}: must divide the model's {spec.experts.num} experts; "
            f"set a divisor of {spec.experts.num}"
        )
    if sizes.tp > 1 and megatron.sequence_parallel is False:
        raise ConfigError(
            f"{_MEGATRON}.sequence_parallel=false: must be null or true for a model with experts and "
            f"tensor_model_parallel_size={sizes.tp}, or each token would go to its experts {sizes.tp} times; set it to "
            "null"
        )


def _check_lengths(config: Config, spec: ModelSpec) -> None:
    inputs, limit = max_input_length(config), spec.max_position_embeddings
    setting = "trainer.max_prompt_length" if config.generator.max_input_length is None else "generator.max_input_length"
    for name in ("sampling_params", "eval_sampling_params"):
        sampling = (
            config.generator.sampling_params if name == "sampling_params" else config.generator.eval_sampling_params
        )
        if inputs + sampling.max_generate_length > limit:
            raise ConfigError(
                f"generator.{name}.max_generate_length={sampling.max_generate_length}: its sum with "
                f"{setting}={inputs} must be at most {limit}, the positions of the model; lower one"
            )


def _check_rows(setting: str, path: str, custom: dict[str, str]) -> None:
    """Checks that every row can be read, names a known environment, and has a unique id if it has one."""
    seen: set[str] = set()
    rows_by_id: dict[str, int] = {}
    for number, row in enumerate(read_rows(path, setting=setting), start=1):
        uid = row_id(row)
        if uid is not None and rows_by_id.setdefault(uid, number) != number:
            raise ConfigError(
                f"{setting}={path}: row {number} has the same extra_info.index as row {rows_by_id[uid]} ({uid}), but "
                "it must be unique; remove the repeated row or renumber the rows"
            )
        env_class = row.get("env_class")
        if env_class is not None and env_class not in seen:
            check_env_class(env_class, custom, setting=f"{setting}={path}: row {number}: env_class")
            seen.add(env_class)
