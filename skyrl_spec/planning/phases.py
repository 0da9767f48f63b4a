"""Memory of a GPU and of its host by phase of a step, what is left for keys, and the largest model that fits.

    sampling   engine whole              worker: what is not offloaded
    training   engine asleep             worker whole
    sync       engine's weights          worker's weights
    save       as sampling               copies of what is written, with ``async_dist_ckpt_save``

Sizes are those of ``memory``: exact but for activations, and without what the frameworks need for themselves (on a GPU
a few GB: CUDA, NCCL, CUDA graphs).
"""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_spec.drafts.kinds.offloads import deepest_sleep
from skyrl_spec.planning.facts import readable
from skyrl_spec.planning.memory import MemoryPlan
from skyrl_spec.settings.derived import longest_sequence, parallel_sizes
from skyrl_spec.settings.schema import Config

_GB = 1e9


@dataclass(frozen=True)
class Phase:
    """Bytes by owner, on one GPU and in host memory for that GPU."""

    name: str
    gpu: dict[str, float]
    host: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.gpu.values())


def phases(config: Config, plan: MemoryPlan) -> list[Phase]:
    """Phases of a step on a GPU with a worker, and with an engine if they share it."""
    shares, level = config.trainer.placement.colocate_all, _sleep_level(config, plan)
    worker, moved = plan.worker, plan.offloaded
    engine = _engine_bytes(config) if shares else 0.0
    asleep, waking = (0.0, float(plan.engine_weights)) if level else (engine, engine)
    lasting = worker.weights + worker.gradients + worker.optimizer + worker.reference
    between = lasting - moved.total
    copies = {"worker": float(moved.host)}
    if level == 1:
        # vLLM keeps the memory of the copies.
        copies["engine's weights"] = float(plan.engine_weights)
    return [
        Phase("sampling", {"engine": engine, "worker": between}, copies),
        Phase("training", {"engine": asleep, "worker": worker.total - moved.reference}, copies),
        Phase("sync", {"engine": waking, "worker": between + moved.weights}, copies),
        Phase(
            "save", {"engine": engine, "worker": between}, copies | {"checkpoint copies": float(plan.checkpoint_copies)}
        ),
    ]


def phase_facts(config: Config, plan: MemoryPlan) -> dict[str, str]:
    """Lines of the dry run about the phases. None on CPU, where all share one memory."""
    if config.trainer.placement.device == "cpu":
        return {}
    limit = config.trainer.hardware.gpu_memory_gb * _GB
    facts = {f"in {phase.name}": _line(phase, limit) for phase in phases(config, plan)}
    return facts | {
        "moves": _moves(config, plan),
        "room for keys": _room(config, plan),
        "largest model": f"about {largest_model(config, plan) / 1e9:.1f}B parameters in this layout, on GPUs of "
        f"{readable(limit)} (trainer.hardware.gpu_memory_gb)",
    }


def move_seconds(config: Config, plan: MemoryPlan) -> dict[str, float]:
    """Seconds of a step's moves between a GPU and its host, at the speed of the settings.

    Optimizer state comes back while the first micro-batches are computed, so a step waits for less. What a canary takes
    comes on top.
    """
    hardware, moved = config.trainer.hardware, plan.offloaded
    seconds = {
        "optimizer state": 2 * moved.optimizer,
        "weights": 2 * moved.weights,
        # Its copy in host memory is always there.
        "reference": moved.reference,
        "engine's weights": 2 * plan.engine_weights if _sleep_level(config, plan) == 1 else 0,
    }
    return {name: num_bytes / (hardware.host_to_gpu_gb_per_s * _GB) for name, num_bytes in seconds.items()}


def save_seconds(config: Config, plan: MemoryPlan) -> float:
    """Seconds to write a checkpoint. Workers with different parts write at the same time."""
    sizes = parallel_sizes(config)
    writers = sizes.tp * (sizes.dp * sizes.cp if config.trainer.policy.megatron_config.use_distributed_optimizer else 1)
    return plan.checkpoint / writers / (config.trainer.hardware.disk_gb_per_s * _GB)


def key_bytes(config: Config, plan: MemoryPlan) -> float:
    """Bytes for keys on each GPU of an engine, before what vLLM measures for a forward pass."""
    return _engine_bytes(config) - plan.engine_weights - plan.draft_probs


def largest_model(config: Config, plan: MemoryPlan) -> float:
    """Parameters of the largest model and draft, in this layout and of these lengths, whose every phase fits.

    What is held for each parameter grows with the model. Activations and keys stay as they are: a larger model has
    larger ones, so this is an upper bound.
    """
    limit, worker = config.trainer.hardware.gpu_memory_gb * _GB, plan.worker
    activations = 0 if worker.update > worker.activations else worker.activations
    # An engine that is whole fills its share of the GPU. In a sync it has weights only, if it sleeps otherwise.
    grows_in_sync = bool(_sleep_level(config, plan))
    one_sequence = plan.kv_bytes_per_token * longest_sequence(config)
    rooms = [(_engine_bytes(config) - plan.draft_probs - one_sequence, float(plan.engine_weights))]
    for phase in phases(config, plan):
        room, grows = limit, phase.gpu["worker"]
        if phase.name == "training":
            room, grows = room - activations, grows - activations
        if phase.name == "sync" and grows_in_sync:
            grows += phase.gpu["engine"]
        else:
            room -= phase.gpu["engine"]
        rooms.append((room, grows))
    factor = min(room / grows for room, grows in rooms if grows > 0)
    return max(0.0, factor) * plan.num_parameters


def _sleep_level(config: Config, plan: MemoryPlan) -> int:
    return deepest_sleep(config, trains_policy=plan.trains_policy)


def _engine_bytes(config: Config) -> float:
    return config.generator.inference_engine.gpu_memory_utilization * config.trainer.hardware.gpu_memory_gb * _GB


def _line(phase: Phase, limit: float) -> str:
    held = " + ".join(f"{owner} {readable(size)}" for owner, size in phase.gpu.items() if size) or "nothing"
    on_host = ", ".join(f"{owner} {readable(size)}" for owner, size in phase.host.items() if size)
    beyond = f": does not fit into {readable(limit)}" if phase.total > limit else ""
    return f"{held} on the GPU{beyond}" + (f"; in host memory {on_host}" if on_host else "")


def _moves(config: Config, plan: MemoryPlan) -> str:
    seconds = {name: value for name, value in move_seconds(config, plan).items() if value}
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    step = f"{sum(seconds.values()):.1f} s a step ({parts})" if seconds else "none in a step"
    return f"{step}; writing a checkpoint {save_seconds(config, plan):.0f} s"


def _room(config: Config, plan: MemoryPlan) -> str:
    room, longest = key_bytes(config, plan), longest_sequence(config)
    count = int(max(room, 0) // (plan.kv_bytes_per_token * longest))
    return f"{readable(max(room, 0))} per GPU of an engine: {count:,} sequences of {longest:,} tokens"
