"""The plan against the memory of a process that trains the examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_spec.planning.memory import plan_memory
from skyrl_spec.settings.compose import load_config

SLOW = pytest.mark.slow
# Without it, glibc keeps freed blocks of up to 32 MiB, which no GPU allocator would count.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=cpu_search_grpo"],
        pytest.param(["experiment=cpu_mtp_grpo"], marks=SLOW),
        pytest.param(["experiment=cpu_mtp_grpo", "trainer.mtp.enabled=false"], marks=SLOW),
        pytest.param(["experiment=cpu_dflash_grpo"], marks=SLOW),
        pytest.param(["experiment=cpu_mtp_grpo", "trainer.max_tokens_per_microbatch=1024"], marks=SLOW),
    ],
)
def test_a_worker_needs_what_the_plan_says(words: list[str]) -> None:
    """Within 15 %, at the peak of a step."""
    script = Path(__file__).with_name("measured_step.py")
    command = [sys.executable, str(script), *words]
    output = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True)
    peak, lasting = map(int, output.stdout.split())
    worker = plan_memory(load_config(words)).worker
    assert worker.total == pytest.approx(peak, rel=0.15)
    # The frameworks' own memory grows a little in the first steps.
    assert worker.total - worker.activations < lasting < worker.total - worker.activations + 60e6
