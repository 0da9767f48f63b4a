"""Benchmark of training steps beside a save, against steps without one and against a save between steps.

    python benchmarks/saves.py                     # about four minutes on two cores

The MTP example trains with its own sizes, and learns next to nothing, so that all steps are alike. Steps take turns:
without a save, with one written beside the step, with one between steps. Sampling is not counted, a save between steps
is. A ratio is a median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import ray

from skyrl_spec.controller.loop import TrainingLoop
from skyrl_spec.controller.run import on_cluster
from skyrl_spec.controller.signals import SignalWatch
from skyrl_spec.controller.task import load_task
from skyrl_spec.settings.compose import load_config

SETTINGS = [
    "experiment=cpu_mtp_grpo", "generator.speculation.schedule=fixed", "trainer.draft.train=every_step",
    "trainer.measure_speedup=false", "trainer.logger=[]", "trainer.resume_mode=null", "trainer.canary.enabled=false",
    "trainer.policy.megatron_config.async_dist_ckpt_save=true", "trainer.policy.optimizer_config.lr=1e-12",
]  # fmt: skip
WITHOUT, BESIDE, BETWEEN = "without a save", "beside the step", "between steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([*SETTINGS, f"trainer.run_dir={folder}/run", *args.settings])
        task = load_task(config, None)
        with on_cluster(task, TrainingLoop, ["policy", "draft"], SignalWatch(), verbose=False) as running:
            seconds = measure(running.trainer, Path(folder), args.rounds)
    print("| save | step s | to a step without one |\n|---|---:|---:|")
    for arm, some in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(some, seconds[WITHOUT], strict=True))
        print(f"| {arm} | {statistics.median(some):.2f} | {ratio:.2f} |")


def measure(trainer: TrainingLoop, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of training and sync with each kind of save. The first round does not count."""
    seconds: dict[str, list[float]] = {WITHOUT: [], BESIDE: [], BETWEEN: []}
    for number in range(rounds + 1):
        for arm, some in seconds.items():
            sampled = trainer.sample()
            start = time.perf_counter()
            if arm == BESIDE:
                trainer.policy.begin_save(folder / f"step_{number}", {})
            trainer.train(sampled)
            if arm == BETWEEN:
                trainer.policy.save_checkpoint(folder / f"step_{number}", {})
            some.append(time.perf_counter() - start)
            if arm == BESIDE:
                trainer.policy.finish_save(wait=True)
    return {arm: some[1:] for arm, some in seconds.items()}


if __name__ == "__main__":
    main()
    ray.shutdown()
