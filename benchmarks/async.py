"""Benchmark of training steps per hour: sampling and training in turns, one step off, and without pause.

    python benchmarks/async.py                     # about twenty minutes on two cores
    python benchmarks/async.py --rounds 1

Engine and trainer have a core each in all arms, as with GPUs of their own. The model of the MTP example samples at a
high temperature, so that lengths have a long tail. It learns next to nothing, so that all steps of all arms have
responses of the same lengths. The arms take turns. The first steps of a run do not count: nothing was sampled beside
the first one, and without pause the batches of the first three begin together. The last two do not count, because
nothing is sampled for steps behind them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from skyrl_spec.controller import placement
from skyrl_spec.controller.run import run_training
from skyrl_spec.metrics import names
from skyrl_spec.settings.compose import load_config

SETTINGS = [
    "experiment=cpu_mtp_grpo", "generator.speculation.schedule=fixed", "trainer.draft.train=every_step",
    "trainer.eval_interval=0", "trainer.eval_before_train=false", "trainer.measure_speedup=false",
    "trainer.ckpt_interval=0", "trainer.save_final_model=false", "trainer.logger=[]", "trainer.resume_mode=null",
    "trainer.canary.enabled=false", "generator.sampling_params.temperature=1.5",
    "generator.sampling_params.max_generate_length=288", "trainer.policy.optimizer_config.lr=1e-12",
]  # fmt: skip
# Steps of a run that do not count.
FIRST, LAST = 3, 2
ASYNC = "trainer.fully_async.enabled=true"
ARMS = {
    "in turns": [],
    "one step off": [ASYNC],
    "without pause": [ASYNC, "trainer.fully_async.max_staleness_steps=2"],
}
PHASES = {"sampling": ("generate",), "training": ("fwd_logprobs", "policy_train", "draft_train"), "step": ("step",)}


def run(words: list[str], folder: Path) -> list[dict[str, float]]:
    """Metrics of the steps that have sampling beside them in every arm."""
    assert run_training(load_config([*SETTINGS, *words, f"trainer.run_dir={folder}"])) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[FIRST:-LAST]


def seconds(rows: list[dict[str, float]], phases: tuple[str, ...]) -> float:
    """Mean seconds of these phases in a step."""
    return statistics.mean(sum(row.get(names.timing(phase), 0.0) for phase in phases) for row in rows)


def idle(rows: list[dict[str, float]]) -> tuple[float, float]:
    """Mean idle shares of trainer and engine. In turns, each waits for the other."""
    beside = [row for row in rows if names.TRAINER_IDLE in row]
    if not beside:
        step, sampling, training = (seconds(rows, PHASES[name]) for name in ("step", "sampling", "training"))
        return 1 - training / step, 1 - sampling / step
    return tuple(statistics.mean(row[name] for row in beside) for name in (names.TRAINER_IDLE, names.ENGINES_IDLE))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("runs/async"))
    parser.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    # Otherwise the side that works alone, in turns, would have all cores.
    placement._cores_of_each_side = lambda config: 1
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(args.rounds):
        for arm, words in ARMS.items():
            more = [f"trainer.max_training_steps={args.steps}", *args.settings]
            rows[arm] += run([*words, *more], args.out / f"{arm.replace(' ', '_')}_{number}")
    print("| arm | sampling s | training s | step s | trainer idle | engine idle | steps per hour, to in turns |")
    print(f"|---|{'---:|' * 6}")
    for arm, some in rows.items():
        parts = {name: seconds(some, phases) for name, phases in PHASES.items()}
        trainer_idle, engine_idle = idle(some)
        if names.SPANS in some[0]:
            # The step waits for less than the engine samples.
            parts["sampling"] = parts["step"] * (1 - engine_idle)
        ratio = seconds(rows["in turns"], PHASES["step"]) / parts["step"]
        print(
            f"| {arm} | {parts['sampling']:.1f} | {parts['training']:.1f} | {parts['step']:.1f} | {trainer_idle:.0%} | "
            f"{engine_idle:.0%} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
