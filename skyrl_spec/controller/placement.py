"""Placement of engines and workers by Ray, on one machine or, if ``RAY_ADDRESS`` is set, on a cluster."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.lossless import PlainEngine
from skyrl_spec.controller.processes import kill_all, open_tree, servers_in_own_sessions
from skyrl_spec.controller.signals import signals_kept_from_children
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.planning.environment import cluster_address, use_short_tmpdir
from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.derived import (
    engine_dtype,
    max_input_length,
    max_staleness,
    parallel_sizes,
    sleep_level,
    sync_backend,
    workers_per_node,
)
from skyrl_spec.settings.schema import Config
from skyrl_spec.training.worker import PolicyWorker

# Share of a GPU that a worker and an engine each reserve with colocate_all. Ray only counts these shares. The memory is
# divided by turns, or by gpu_memory_utilization where engines do not sleep.
_GPU_SHARE = 0.5
# Share of a core that a worker reserves on CPU, so that Ray has something to spread over machines.
_CPU_SHARE = 0.01
# Tries to start Ray, and its error if its servers are too slow.
_RAY_STARTS, _TIMED_OUT = 3, "timed out during startup"


@contextmanager
def ray_session(verbose: bool) -> Iterator[None]:
    """Starts Ray, or joins the cluster of ``RAY_ADDRESS``, for the time of the context.

    A local Ray keeps its files in a folder that is removed at the end. Signals to this process, or to its group, do not
    end its processes.

    Raises:
        ConfigError: the cluster cannot be joined, or the folder for temporary files does not serve.
    """
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.WARNING if verbose else logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Even without log_to_driver, Ray prints a paragraph for every process that dies. The run prints a line instead.
    ray._private.worker._worker_logs_enabled = verbose
    use_short_tmpdir()
    if cluster_address() is not None:
        _join_cluster(options)
        try:
            yield
        finally:
            ray.shutdown()
        return
    directory, servers = _start_local_ray(options)
    try:
        yield
    finally:
        _end_local_ray(servers)
        _remove(directory)


def _start_local_ray(options: dict[str, Any]) -> tuple[str, list[Popen[bytes]]]:
    """Starts Ray, and returns its folder and its servers. Ray gives up after half a minute, so it is tried again.

    Raises:
        RunError: it did not start.
    """
    for attempt in range(1, _RAY_STARTS + 1):
        # The prefix is short: sockets below it must stay within 107 characters.
        directory, servers = tempfile.mkdtemp(prefix="skyrl-"), list[Popen[bytes]]()
        try:
            # A signal that was kept raises at the end of this context.
            with signals_kept_from_children(), servers_in_own_sessions() as servers:
                ray.init("local", include_dashboard=False, _temp_dir=directory, **options)
            return directory, servers
        except BaseException as error:
            _end_local_ray(servers)
            _remove(directory)
            if _TIMED_OUT not in str(error):
                raise
        if attempt < _RAY_STARTS:
            print("skyrl-spec: warning: Ray's servers did not start in time; trying again", file=sys.stderr)
    raise RunError(
        f"Ray's servers did not start in {_RAY_STARTS} tries of half a minute; other programs may take all cores or "
        "memory of this machine: end some of them"
    )


def _join_cluster(options: dict[str, Any]) -> None:
    try:
        with signals_kept_from_children():
            ray.init(**options)
    # Another version of Ray or Python there, or none that RAY_ADDRESS=auto could find.
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"RAY_ADDRESS={cluster_address()}: the cluster cannot be joined ({reason}); correct it, or unset it for a "
            "Ray of its own"
        ) from error


def _end_local_ray(servers: list[Popen[bytes]]) -> None:
    """Ends Ray's servers and their descendants. SIGTERM would end none of them."""
    for process in servers:
        # Ray sends SIGTERM, and waits a second for each.
        process.terminate = process.kill  # type: ignore[method-assign]
    pidfds = open_tree(process.pid for process in servers)
    ray.shutdown()
    kill_all(pidfds)
    for process in servers:
        # Takes note of its end.
        process.poll()


def _remove(directory: str, patience_s: float = 5.0) -> None:
    """Removes ``directory``. Processes may still write log files there, so it tries for a while."""
    deadline = time.monotonic() + patience_s
    while os.path.exists(directory) and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)


def engine_settings(config: Config) -> EngineSettings:
    """Settings of an engine, with defaults filled in from the whole configuration."""
    engine, device = config.generator.inference_engine, config.trainer.placement.device
    longest = max(
        sampling.max_generate_length
        for sampling in (config.generator.sampling_params, config.generator.eval_sampling_params)
    )
    return EngineSettings(
        model_path=_on_any_node(config.trainer.policy.model.path),
        dtype=engine_dtype(config),
        device=device,
        tensor_parallel_size=engine.tensor_parallel_size,
        max_model_len=max_input_length(config) + longest,
        max_num_seqs=engine.max_num_seqs,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        cpu_kvcache_space=engine.cpu_kvcache_space,
        enable_prefix_caching=engine.enable_prefix_caching,
        enforce_eager=engine.enforce_eager,
        seed=config.trainer.seed,
        speculative_config=_speculative_on_any_node(config),
        returns_experts=config.trainer.algorithm.router_replay,
        schedule=config.generator.speculation.schedule,
        synced=("policy",) if trained_kind(config.trainer) is None else ("policy", "draft"),
        sleep_level=sleep_level(config),
        weight_sync_backend=sync_backend(config),
        num_threads=max(1, _cores_of_each_side(config) // engine.num_engines) if device == "cpu" else None,
        engine_init_kwargs=engine.engine_init_kwargs,
    )


def _on_any_node(path: str) -> str:
    """``path`` made absolute, because actors have another working directory. Hub names are unchanged."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def _speculative_on_any_node(config: Config) -> dict[str, Any] | None:
    speculative = build_speculative_config(config)
    if speculative is None or not speculative.get("model"):
        return speculative
    return speculative | {"model": _on_any_node(speculative["model"])}


def _workers_config(config: Config) -> Config:
    """``config`` with absolute directories, for workers on any machine."""
    trainer, policy = config.trainer, config.trainer.policy
    kind = trained_kind(trainer)
    path = None if kind is None else kind.path(trainer)
    if kind is not None and path is not None:
        trainer = kind.with_path(trainer, _on_any_node(path))
    policy = replace(policy, model=replace(policy.model, path=_on_any_node(policy.model.path)))
    return replace(config, trainer=replace(trainer, policy=policy))


def start_actors(
    config: Config, settings: EngineSettings, total_optimizer_steps: int, *, freeze_policy: bool = False
) -> tuple[EngineGroup, PolicyGroup]:
    """Starts engines and workers: at the same time, or one after the other if they share GPUs.

    Raises:
        RunError: they were not up within ``trainer.placement.timeout_s``.
    """
    deadline = time.monotonic() + config.trainer.placement.timeout_s
    gpus = reserve_gpus(config, deadline)
    bundles = worker_bundles(config, gpus)
    # They leave their GPUs alone until ``start``.
    workers = _create_workers(config, worker_options(config, bundles))
    devices = _get([worker.visible_devices.remote() for worker in workers], deadline, "policy workers", config)
    engine_groups = reserve_engines(config, deadline)
    places_of_engines = bundles_by_rank(engine_groups) if config.trainer.placement.device == "cpu" else bundles
    options = engine_options(config, settings, places_of_engines, devices)
    engines = [_create_engine(settings, *numbered) for numbered in enumerate(options)]
    pings = [engine.ping.remote() for engine in engines]
    if config.trainer.placement.colocate_all:
        # vLLM measures the GPU's free memory while it starts. If a worker changes it, vLLM fails or takes less.
        _get(pings, deadline, "rollout engines", config)
        if settings.sleep_level:
            # Their weights are those of the checkpoint on disk, and stay.
            _get([engine.sleep.remote(1) for engine in engines], deadline, "rollout engines", config)
    (store_address,) = _get([workers[0].serve_store.remote()], deadline, "policy workers", config)
    started = [worker.start.remote(store_address, total_optimizer_steps, freeze_policy) for worker in workers]
    _get(started, deadline, "policy workers", config)
    _get(pings, deadline, "rollout engines", config)
    places = _get([worker.place.remote() for worker in workers], deadline, "policy workers", config)
    reserved = [*gpus, *engine_groups]
    policy = PolicyGroup(workers, places, config.trainer.placement.worker_timeout_s, reserved)
    return _engine_group(config, engines, partial(_restart_engine, config, settings, options), policy), policy


def start_plain_engine(config: Config, settings: EngineSettings, policy: PolicyGroup) -> PlainEngine:
    """Starts an engine without a draft, but otherwise like the others, for comparison."""
    plain = replace(settings, speculative_config=None)
    start = partial(_restart_engine, config, plain, [actor_options(plain)])
    return PlainEngine(_engine_group(config, [start(0)], start, policy), policy)


def _engine_group(config: Config, engines: list[Any], start: Callable[[int], Any], policy: PolicyGroup) -> EngineGroup:
    engine = config.generator.inference_engine
    # policy.check notices a worker that dies while engines generate. Workers that train meanwhile do not answer it.
    check = (lambda: None) if max_staleness(config) else policy.check
    return EngineGroup(engines, engine.generate_timeout_s, start, engine.max_restarts, check)


def _restart_engine(config: Config, settings: EngineSettings, options: list[dict[str, Any]], index: int) -> Any:
    """Builds engine number ``index`` and waits for it."""
    engine = _create_engine(settings, index, options[index])
    deadline = time.monotonic() + config.trainer.placement.timeout_s
    _get([engine.ping.remote()], deadline, "rollout engines", config)
    return engine


def reserve_gpus(config: Config, deadline: float) -> list[PlacementGroup]:
    """Reserves a GPU for each policy worker: ``policy_num_nodes`` groups, each on one machine.

    Two groups may be on the same machine if it has enough GPUs. On CPU it is one group with a bundle for the workers of
    each machine; empty for one machine. Bundles are on different machines as far as there are some. Removing the groups
    releases what they reserve, and Ray removes them when the driver's connection ends.

    Raises:
        RunError: the GPUs were not free by ``deadline`` (of ``time.monotonic``).
    """
    placement = config.trainer.placement
    per_node, num_nodes = workers_per_node(config), placement.policy_num_nodes
    if placement.device == "cpu":
        nodes = [{"CPU": _CPU_SHARE * per_node}] * num_nodes
        groups = [placement_group(nodes, strategy="SPREAD")] if num_nodes > 1 else []
    else:
        node = [{"GPU": 1, "CPU": 1}] * per_node
        groups = [placement_group(node, strategy="STRICT_PACK") for _ in range(num_nodes)]
    what = f"{per_node} policy workers on each of {num_nodes} machines"
    try:
        _get([group.ready() for group in groups], deadline, what, config)
    except RunError:
        for group in groups:
            remove_placement_group(group)
        raise
    return groups


def reserve_engines(config: Config, deadline: float) -> list[PlacementGroup]:
    """Places for engines on CPU, on different machines as far as there are some. Empty on GPUs and on one machine.

    Without a place, Ray would put an engine on the driver's machine. So it does with an engine that asks for a machine
    (``NodeAffinitySchedulingStrategy``), while the news of that machine is on its way.

    Raises:
        RunError: there was none by ``deadline`` (of ``time.monotonic``).
    """
    num_engines, num_nodes = config.generator.inference_engine.num_engines, sum(node["Alive"] for node in ray.nodes())
    if config.trainer.placement.device != "cpu" or num_nodes == 1:
        return []
    group = placement_group([{"CPU": _CPU_SHARE}] * num_engines, strategy="SPREAD")
    _get([group.ready()], deadline, f"places for {num_engines} engines", config)
    return [group]


def bundles_by_rank(groups: list[PlacementGroup]) -> list[PlacementGroupSchedulingStrategy]:
    """Bundle of each rank, machine after machine: neighbours form tensor-parallel groups."""
    return [
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        for group in groups
        for index in range(group.bundle_count)
    ]


def worker_bundles(config: Config, groups: list[PlacementGroup]) -> list[PlacementGroupSchedulingStrategy]:
    """Bundle of each worker, by rank. Empty if they need none."""
    shared_by = workers_per_node(config) if config.trainer.placement.device == "cpu" else 1
    return [bundle for bundle in bundles_by_rank(groups) for _ in range(shared_by)]


def engine_options(
    config: Config,
    settings: EngineSettings,
    bundles: list[PlacementGroupSchedulingStrategy],
    devices: list[str],
) -> list[dict[str, Any]]:
    """Ray's options for each engine: GPUs of its own or, with ``colocate_all``, those of as many ranks, in their order.

    Args:
        bundles: of each rank; on CPU, of each engine (``reserve_engines``).
        devices: GPU of each rank, as CUDA names it on its machine.
    """
    options, num_engines = actor_options(settings), config.generator.inference_engine.num_engines
    if config.trainer.placement.device == "cpu":
        if not bundles:
            return [options] * num_engines
        return [options | {"num_cpus": _CPU_SHARE, "scheduling_strategy": bundle} for bundle in bundles]
    if not config.trainer.placement.colocate_all:
        return [options] * num_engines
    size = settings.tensor_parallel_size
    if size == 1:
        shared = options | {"num_gpus": _GPU_SHARE}
        return [shared | {"scheduling_strategy": bundle} for bundle in bundles[:num_engines]]
    return [
        _on_devices(options, devices[first : first + size]) | {"scheduling_strategy": bundles[first]}
        for first in range(0, num_engines * size, size)
    ]


def _on_devices(options: dict[str, Any], devices: list[str]) -> dict[str, Any]:
    """``options`` for an actor that sees these GPUs. Ray has no shares of several GPUs, so it does not count them."""
    variables = options["runtime_env"]["env_vars"] | {
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    return options | {"num_gpus": 0, "runtime_env": {"env_vars": variables}}


def worker_options(config: Config, bundles: list[PlacementGroupSchedulingStrategy]) -> list[dict[str, Any]]:
    """Ray's options for each policy worker."""
    placement = config.trainer.placement
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if placement.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(_threads_per_worker(config))
        # On CPU, engines and workers take turns on the same cores, so they reserve next to nothing in Ray.
        options = {"num_cpus": 0, "num_gpus": 0, "runtime_env": {"env_vars": environment}}
        if not bundles:
            return [options] * parallel_sizes(config).world_size
        return [options | {"num_cpus": _CPU_SHARE, "scheduling_strategy": bundle} for bundle in bundles]
    share = _GPU_SHARE if placement.colocate_all else 1
    options = {"num_cpus": 1, "num_gpus": share, "runtime_env": {"env_vars": environment}}
    return [options | {"scheduling_strategy": bundle} for bundle in bundles]


def _create_engine(settings: EngineSettings, index: int, options: dict[str, Any]) -> Any:
    actor_class: Any = RolloutActor
    return actor_class.options(**options).remote(replace(settings, seed=settings.seed + index))


def _create_workers(config: Config, options: list[dict[str, Any]]) -> list[Any]:
    num_threads = _threads_per_worker(config) if config.trainer.placement.device == "cpu" else None
    worker_class: Any = PolicyWorker
    config = _workers_config(config)
    return [
        worker_class.options(**own).remote(config, rank, len(options), num_threads) for rank, own in enumerate(options)
    ]


def _threads_per_worker(config: Config) -> int:
    return max(1, _cores_of_each_side(config) // parallel_sizes(config).world_size)


def _cores_of_each_side(config: Config) -> int:
    """Cores for the engines, and for the workers: all in turns, or half of them each if they work at the same time."""
    return num_cores() // 2 if max_staleness(config) else num_cores()


def _get(refs: list[Any], deadline: float, what: str, config: Config) -> list[Any]:
    try:
        return ray.get(refs, timeout=max(0.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        have, free = ray.cluster_resources(), ray.available_resources()
        raise RunError(
            f"trainer.placement.timeout_s={config.trainer.placement.timeout_s:g}: {what} were not up in time "
            f"(GPUs in the cluster: {have.get('GPU', 0):g}, free: {free.get('GPU', 0):g}); "
            "ask for fewer GPUs (trainer.placement.policy_num_gpus_per_node, policy_num_nodes), add machines, "
            "or raise it"
        ) from None


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
