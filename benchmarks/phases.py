"""Plans of the recipes for 8 GPUs: memory of a GPU by phase, host memory, seconds of moves, room for keys.

    python benchmarks/phases.py

Nothing runs on a GPU. The numbers are those of ``trainer.dry_run`` (``planning/phases.py``), for GPUs of
``trainer.hardware``. Models and drafts are only their ``config.json``.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

from recipes import MODELS, recipe

from skyrl_spec.planning.memory import MemoryPlan, plan_memory
from skyrl_spec.planning.phases import key_bytes, largest_model, move_seconds, phases, save_seconds
from skyrl_spec.settings.derived import longest_sequence
from skyrl_spec.settings.schema import Config

HEADS = (
    "recipe", "GPUs", "sampling", "training", "sync", "host, GB a GPU", "moves, s a step", "checkpoint, s",
    "sequences per engine", "largest model, B",
)  # fmt: skip


def layouts(config: Config) -> dict[str, Config]:
    """The recipe as it is, and with all GPUs shared: engines that keep their memory, and that sleep at both levels."""
    found = {"4 train, 4 sample": config}
    shared_layouts = (("8, no sleep", 0, 0.5, 1), ("8, level 1", 1, 0.85, 1), ("8, level 2", 2, 0.85, 1))
    for name, level, share, size in (*shared_layouts, ("8, level 2, engines of 2", 2, 0.85, 2)):
        found[name] = shared = copy.deepcopy(config)
        engine, placement = shared.generator.inference_engine, shared.trainer.placement
        placement.colocate_all, placement.policy_num_gpus_per_node = True, 8
        engine.num_engines, engine.tensor_parallel_size = 8 // size, size
        engine.sleep_level, engine.gpu_memory_utilization = level, share
        if level == 0:
            # Nothing would use the memory.
            shared.trainer.policy.megatron_config.cpu_offload = False
            for part in (shared.trainer.policy, shared.trainer.mtp, shared.trainer.dflash):
                part.optimizer_config.offload_after_step = False
    return found


def row(name: str, layout: str, config: Config, plan: MemoryPlan) -> str:
    by_name = {phase.name: phase for phase in phases(config, plan)}
    limit = config.trainer.hardware.gpu_memory_gb
    sizes = [by_name[phase].total / 1e9 for phase in ("sampling", "training", "sync")]
    cells = [name, layout, *(f"{size:.0f}{' (too much)' if size > limit else ''}" for size in sizes)]
    cells += [f"{max(sum(phase.host.values()) for phase in by_name.values()) / 1e9:.0f}"]
    cells += [f"{sum(move_seconds(config, plan).values()):.1f}", f"{save_seconds(config, plan):.0f}"]
    one = plan.kv_bytes_per_token * longest_sequence(config)
    cells += [f"{int(max(0.0, key_bytes(config, plan)) // one):,}", f"{largest_model(config, plan) / 1e9:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(f"| {' | '.join(HEADS)} |\n|---|---|{'---:|' * (len(HEADS) - 2)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            for layout, config in layouts(recipe(name, Path(folder))).items():
                print(row(name, layout, config, plan_memory(config)))


if __name__ == "__main__":
    main()
