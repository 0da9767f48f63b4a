"""Benchmark of what the age of batches costs: held-out reward and acceptance length, in turns and one step off.

    python benchmarks/staleness.py                     # three seeds, about forty minutes on two cores
    python benchmarks/staleness.py --seeds 0 --staleness 0 1 2

Whole runs of an experiment that differ in ``trainer.fully_async.max_staleness_steps`` and the seed alone. The draft
trains in every step and drafts the same number of tokens in every step, so that nothing depends on the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from skyrl_spec.controller.run import run_training
from skyrl_spec.metrics import names
from skyrl_spec.settings.compose import load_config

SETTINGS = [
    "generator.speculation.schedule=fixed", "trainer.draft.train=every_step", "trainer.measure_speedup=false",
    "trainer.eval_before_train=false", "trainer.ckpt_interval=0", "trainer.save_final_model=false",
    "trainer.logger=[]", "trainer.resume_mode=null",
]  # fmt: skip


def run(words: list[str], folder: Path) -> tuple[float, float, float]:
    """Held-out reward at the end, and acceptance length there and in the second half of the steps."""
    assert run_training(load_config([*words, f"trainer.run_dir={folder}"])) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    late = [row[names.acceptance_length("train")] for row in rows[len(rows) // 2 :]]
    return rows[-1][names.EVAL_SCORE], rows[-1][names.acceptance_length("eval")], statistics.mean(late)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="cpu_mtp_grpo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    parser.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    found: dict[int, list[tuple[float, float, float]]] = {age: [] for age in args.staleness}
    for seed in args.seeds:
        for age, results in found.items():
            asynchronous = f"trainer.fully_async.enabled={str(age > 0).lower()}"
            words = [f"experiment={args.experiment}", *SETTINGS, asynchronous, f"trainer.seed={seed}"]
            words += [f"trainer.fully_async.max_staleness_steps={age}"] if age else []
            results.append(run([*words, *args.settings], args.out / f"{age}_{seed}"))
            print(f"max_staleness_steps={age} seed={seed}: {results[-1]}", flush=True)
    print("| max_staleness_steps | held-out reward | of each seed | acceptance length there | in late steps |")
    print("|---|---:|---:|---:|---:|")
    for age, results in found.items():
        rewards, held_out, late = zip(*results, strict=True)
        each = ", ".join(f"{reward:.3f}" for reward in rewards)
        means = statistics.mean(rewards), statistics.mean(held_out), statistics.mean(late)
        print(f"| {age} | {means[0]:.3f} | {each} | {means[1]:.2f} | {means[2]:.2f} |")


if __name__ == "__main__":
    main()
