"""Where the actors run: Ray, one machine or many (``RAY_ADDRESS`` joins a cluster)."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray

from skyrl_spec.config import Config, RunError
from skyrl_spec.megatron.worker import PolicyWorker
from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine import EngineSettings
from skyrl_spec.rollout.speculative import build_speculative_config
from skyrl_spec.trainer.actors import EngineGroup, PolicyGroup
from skyrl_spec.validation import parallel_layout


@contextmanager
def ray_session(verbose: bool) -> Iterator[None]:
    """Ray for the time of a run. A local one keeps its files in a folder that is removed at the end."""
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.WARNING if verbose else logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # The prefix is short: sockets below it must stay within 107 characters.
    directory = tempfile.mkdtemp(prefix="skyrl-")
    try:
        ray.init("local", include_dashboard=False, _temp_dir=directory, **options)
        yield
    finally:
        ray.shutdown()
        _remove(directory)


def _remove(directory: str, patience_s: float = 5.0) -> None:
    """Ray's processes write their last log lines while they end, so a first attempt may leave some behind."""
    deadline = time.monotonic() + patience_s
    while os.path.exists(directory) and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)


def engine_settings(config: Config) -> EngineSettings:
    """``generator.inference_engine`` with everything decided."""
    engine, device = config.generator.inference_engine, config.trainer.placement.device
    longest = max(
        sampling.max_generate_length
        for sampling in (config.generator.sampling_params, config.generator.eval_sampling_params)
    )
    return EngineSettings(
        model_path=config.trainer.policy.model.path,
        dtype=engine.dtype or config.trainer.policy.megatron_config.dtype,
        device=device,
        tensor_parallel_size=engine.tensor_parallel_size,
        max_model_len=config.trainer.max_prompt_length + longest,
        max_num_seqs=engine.max_num_seqs,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        cpu_kvcache_space=engine.cpu_kvcache_space,
        enable_prefix_caching=engine.enable_prefix_caching,
        enforce_eager=engine.enforce_eager,
        seed=config.trainer.seed,
        speculative_config=build_speculative_config(config.trainer, engine.speculative_config),
        weight_sync_backend=sync_backend(config),
        num_threads=max(1, _num_cores() // engine.num_engines) if device == "cpu" else None,
        engine_init_kwargs=engine.engine_init_kwargs,
    )


def sync_backend(config: Config) -> str:
    """``ray`` on CPU and ``nccl`` on GPU, unless the configuration names one."""
    default = "ray" if config.trainer.placement.device == "cpu" else "nccl"
    return config.generator.inference_engine.weight_sync_backend or default


def start_actors(
    config: Config, settings: EngineSettings, total_optimizer_steps: int
) -> tuple[EngineGroup, PolicyGroup]:
    """Start engines and workers side by side.

    Raises:
        RunError: they were not up within ``trainer.placement.timeout_s``.
    """
    deadline = time.monotonic() + config.trainer.placement.timeout_s
    engines = [_create_engine(settings, index) for index in range(config.generator.inference_engine.num_engines)]
    workers = _create_workers(config)
    init_method = "tcp://{}:{}".format(*_get([workers[0].address.remote()], deadline, "policy workers", config)[0])
    started = [worker.start.remote(init_method, total_optimizer_steps) for worker in workers]
    _get(started, deadline, "policy workers", config)
    _get([engine.ping.remote() for engine in engines], deadline, "rollout engines", config)
    places = ray.get([worker.place.remote() for worker in workers])
    timeout_s = config.generator.inference_engine.generate_timeout_s
    return EngineGroup(engines, timeout_s), PolicyGroup(workers, places)


def start_plain_engine(config: Config, settings: EngineSettings) -> EngineGroup:
    """A further engine of the same build without a draft, to compare with."""
    engine = _create_engine(replace(settings, speculative_config=None), index=0)
    deadline = time.monotonic() + config.trainer.placement.timeout_s
    _get([engine.ping.remote()], deadline, "rollout engines", config)
    return EngineGroup([engine], config.generator.inference_engine.generate_timeout_s)


def _create_engine(settings: EngineSettings, index: int) -> Any:
    seeded = replace(settings, seed=settings.seed + index)
    actor_class: Any = RolloutActor
    return actor_class.options(**actor_options(seeded)).remote(seeded)


def _create_workers(config: Config) -> list[Any]:
    world_size, _, _ = parallel_layout(config)
    on_cpu = config.trainer.placement.device == "cpu"
    num_threads = max(1, _num_cores() // world_size) if on_cpu else None
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    # On CPU engines and workers take turns on the same cores, so none of them asks Ray for one.
    options = {"num_cpus": 0 if on_cpu else 1, "num_gpus": 0 if on_cpu else 1, "runtime_env": {"env_vars": environment}}
    worker_class: Any = PolicyWorker
    return [worker_class.options(**options).remote(config, rank, world_size, num_threads) for rank in range(world_size)]


def _get(refs: list[Any], deadline: float, what: str, config: Config) -> list[Any]:
    try:
        return ray.get(refs, timeout=max(0.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        have, free = ray.cluster_resources(), ray.available_resources()
        raise RunError(
            f"trainer.placement.timeout_s={config.trainer.placement.timeout_s:g}: {what} were not up in time "
            f"(GPUs in the cluster: {have.get('GPU', 0):g}, free: {free.get('GPU', 0):g}); "
            "ask for fewer GPUs, add nodes, or raise it"
        ) from None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
