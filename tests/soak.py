"""Two hundred short steps, and what the processes of the run hold at the start and at the end: ``make soak``.

Memory, open files and threads of every process, and shared memory, are read every second. A leak grows with the steps,
so the last quarter of the run is held against the second one: allocators and caches fill up in the first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

MARK = "SKYRL_SPEC_SOAK"
MIB = 2**20
# Growth that is noise: of memory, and of counts.
ALLOWED_MIB, ALLOWED_COUNT = 32.0, 4.0
OVERRIDES = (
    "experiment=cpu_mtp_grpo",
    "trainer.train_batch_size=4",
    "trainer.policy_mini_batch_size=4",
    "generator.n_samples_per_prompt=4",
    "generator.sampling_params.max_generate_length=40",
    # Touched block by block as the prefix cache fills up: a large one would look like a leak for hundreds of steps.
    "generator.inference_engine.cpu_kvcache_space=0.0625",
    "trainer.eval_interval=20",
    "trainer.ckpt_interval=20",
    "trainer.canary.interval=5",
    "generator.speculation.schedule=fixed",
    "trainer.draft.train=every_step",
    "trainer.measure_speedup=false",
)
# oneDNN keeps what it compiled for each shape of a batch, 1024 of them: the engine of the example gains 200 MiB by that
# over hundreds of steps, and nothing (852 to 859 MiB) where it keeps few.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


@dataclass
class Series:
    """What one process held, by step."""

    rss_mib: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)


def role(process: psutil.Process) -> str:
    """A name that stays while a process lives: Ray puts the running method into the title of an actor."""
    line = process.cmdline()
    name = line[0].split(".")[0] if line and line[0].startswith("ray::") else process.name()
    return f"{name} {process.pid}"


def read(mark: str, series: dict[str, Series]) -> None:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) != mark:
                continue
            with process.oneshot():
                name = role(process)
                series[name].rss_mib.append(process.memory_info().rss / MIB)
                series[name].files.append(process.num_fds())
                series[name].threads.append(process.num_threads())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def shared_memory_mib() -> float:
    return psutil.disk_usage("/dev/shm").used / MIB


def quarters(values: list[float]) -> tuple[float, float]:
    """Medians of the second and the last quarter."""
    size = len(values) // 4
    return median(values[size : 2 * size]), median(values[-size:])


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    mark, series, shared = uuid.uuid4().hex, defaultdict[str, Series](Series), list[float]()
    overrides = [*OVERRIDES, f"trainer.max_training_steps={arguments.steps}", f"trainer.run_dir={arguments.run_dir}"]
    # A former run's must not count.
    (arguments.run_dir / "metrics.jsonl").unlink(missing_ok=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "skyrl_spec", "train", *overrides]
    with subprocess.Popen(command, env=os.environ | ENVIRONMENT | {MARK: mark}) as run:
        while run.poll() is None:
            if steps_of(arguments.run_dir) >= 1:
                read(mark, series)
                shared.append(shared_memory_mib())
            time.sleep(1.0)
    if run.returncode:
        return run.returncode
    print(f"\n{arguments.steps} steps in {time.monotonic() - started:.0f} s; medians of the second and last quarter")
    print(f"{'process':<34}{'RSS MiB':>16}{'open files':>16}{'threads':>16}")
    grown = []
    longest = max(len(found.threads) for found in series.values())
    for name, found in sorted(series.items()):
        # Of those that were there from the first step to the last.
        if len(found.threads) < 0.9 * longest:
            continue
        cells = ""
        for what, values, allowed in (
            ("RSS", found.rss_mib, ALLOWED_MIB),
            ("open files", found.files, ALLOWED_COUNT),
            ("threads", found.threads, ALLOWED_COUNT),
        ):
            first, last = quarters(values)
            cells += f"{f'{first:.0f} -> {last:.0f}':>16}"
            if last - first > allowed:
                grown.append(f"{name}: {what} {first:.0f} -> {last:.0f}")
        print(f"{name:<34}{cells}")
    first, last = quarters(shared)
    print(f"{'/dev/shm':<34}{f'{first:.0f} -> {last:.0f}':>16}")
    if last - first > ALLOWED_MIB:
        grown.append(f"/dev/shm {first:.0f} -> {last:.0f}")
    print("\n".join(grown) or "nothing grew")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
