"""Settings of an engine, and what vLLM is told because of them: arguments, and variables of its process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from skyrl_spec.drafts.speculation import drafts_under_way, require_exact_rejection
from skyrl_spec.rollout.engine_args import OWN_ENGINE_ARGS, require_other_engine_args
from skyrl_spec.settings.schedule import dense_table
from skyrl_spec.specs.dtypes import DTYPES
from skyrl_spec.specs.files import model_directory, read_config
from skyrl_spec.types import Component


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one engine: ``generator.inference_engine`` with all defaults filled in."""

    model_path: str
    dtype: str = "bf16"
    # "cpu" or "cuda".
    device: str = "cuda"
    tensor_parallel_size: int = 1
    # Largest number of tokens in prompt and response together.
    max_model_len: int = 2048
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.8
    # GiB, on CPU only.
    cpu_kvcache_space: float = 1.0
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    seed: int = 0
    speculative_config: dict[str, Any] | None = None
    # Whether a response comes with the experts of its tokens.
    returns_experts: bool = False
    # "fixed", "auto", or rows [first batch size, last batch size, drafted tokens].
    schedule: str | list[list[int]] = "fixed"
    # What syncs bring.
    synced: tuple[Component, ...] = ("policy",)
    # Level at which the engine sleeps while workers train on its GPU. 0: it does not.
    sleep_level: int = 0
    # "ray", "nccl" or "ipc".
    weight_sync_backend: str = "nccl"
    # OpenMP threads on CPU; None leaves them to the environment.
    num_threads: int | None = None
    engine_init_kwargs: dict[str, Any] = field(default_factory=dict)


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """Environment variables for an engine's process. OpenMP and vLLM's logger read them once, when they are loaded."""
    environment = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.device == "cpu":
        # Scheduler and worker share a process: messages between two cost more than a decode step of a small model.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Engine and trainer take turns on the same cores, so none of them may be tied to one.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if settings.enforce_eager:
            # Otherwise a helper of the sampler is compiled, which takes seconds and needs a C++ compiler.
            environment["TORCH_COMPILE_DISABLE"] = "1"
        if settings.num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(settings.num_threads)
    else:
        # Exact sampling is tested with this model runner and its rejection sampler. vLLM prefers its V2 runner on
        # GPUs. Remove when the tests have run on that one.
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if settings.weight_sync_backend == "ipc":
        # A handle to GPU memory holds classes and a dtype. vLLM can send these to its engine process only by pickle.
        # The only peer is that process, over a socket of this machine.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return environment


def context_len(settings: EngineSettings) -> int:
    """Context length for vLLM: ``max_model_len`` plus room for drafts, as far as the model has positions.

    vLLM stops drafting for the whole batch while one sequence has no room for a draft. The draft's keys of those steps
    are never computed, so drafts for the other sequences stay worse afterwards.
    """
    if settings.speculative_config is None:
        return settings.max_model_len
    # A DFlash block also holds the last sampled token and needs exactly this room. MTP needs one position less.
    room = drafts_under_way(settings.device) * settings.speculative_config.get("num_speculative_tokens", 0)
    positions = read_config(model_directory(settings.model_path)).get("max_position_embeddings")
    return settings.max_model_len + room if positions is None else min(settings.max_model_len + room, positions)


def engine_args(settings: EngineSettings) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM``.

    Raises:
        ConfigError: a draft that makes rollouts inexact, or an entry of ``engine_init_kwargs`` that is not allowed.
    """
    require_exact_rejection(settings.speculative_config)
    require_other_engine_args(settings.engine_init_kwargs)
    args: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": DTYPES[settings.dtype].torch_name,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": context_len(settings),
        "max_num_seqs": settings.max_num_seqs,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "enforce_eager": settings.enforce_eager,
        "seed": settings.seed,
        "speculative_config": settings.speculative_config,
        "weight_transfer_config": {"backend": settings.weight_sync_backend},
        # Log-probs of the distribution sampled from: after temperature, top-k and top-p.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": False,
        "use_tqdm_on_load": False,
        "worker_extension_cls": "skyrl_spec.rollout.worker_extension.WorkerExtension",
    }
    if settings.speculative_config is not None:
        args |= _schedule_args(settings)
    if settings.device == "cpu":
        args["kv_cache_memory_bytes"] = int(settings.cpu_kvcache_space * 2**30)
    else:
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
        args["enable_sleep_mode"] = settings.sleep_level > 0
    assert args.keys() <= OWN_ENGINE_ARGS, args.keys() - OWN_ENGINE_ARGS
    return args | settings.engine_init_kwargs


def _schedule_args(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of a schedule: our scheduler, and vLLM's own schedule, which allows drafts of any length."""
    schedule, speculative = settings.schedule, settings.speculative_config
    assert speculative is not None
    if schedule == "fixed":
        return {}
    from skyrl_spec.rollout.scheduler import PATHS, TABLE

    largest = settings.max_num_seqs
    rows = [[1, largest, speculative["num_speculative_tokens"]]] if isinstance(schedule, str) else schedule
    return {
        "scheduler_cls": PATHS[settings.device],
        "additional_config": {TABLE: None if schedule == "auto" else dense_table(rows, largest)},
        "speculative_config": speculative | {"num_speculative_tokens_per_batch_size": rows},
    }


def with_local_models(settings: EngineSettings) -> EngineSettings:
    """``settings`` with hub names replaced by local directories, on the engine's node: each node has its own cache.

    This includes the draft's name. Otherwise vLLM asks the hub for one of its files in every weight update.
    """
    speculative = settings.speculative_config
    if speculative is not None and speculative.get("model"):
        draft = model_directory(speculative["model"], "generator.inference_engine.speculative_config.model")
        speculative = speculative | {"model": str(draft)}
    return replace(settings, model_path=str(model_directory(settings.model_path)), speculative_config=speculative)
