"""A sync canary's mismatch costs a run no step: the step is written and saved, and the run restarts from it or ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import forgetful_run
import pytest
from faults import OVERRIDES

from skyrl_spec.metrics import names
from skyrl_spec.metrics.writers import read_jsonl

SETTINGS = (
    "experiment=cpu_mtp_grpo",
    *OVERRIDES,
    "trainer.canary.on_mismatch=error",
    "trainer.max_training_steps=4",
    "trainer.max_restarts=1",
    # No step is saved otherwise.
    "trainer.ckpt_interval=100",
    "trainer.eval_interval=0",
    "trainer.eval_before_train=false",
    "trainer.measure_speedup=false",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mismatch_saves_its_step_and_restarts_from_it(tmp_path: Path) -> None:
    run_dir, lost = tmp_path / "run", tmp_path / "lost.json"
    # The second one comes after the restart, when none is left.
    lost.write_text(json.dumps([2, 3]))
    command = [sys.executable, forgetful_run.__file__, str(lost), *SETTINGS, f"trainer.run_dir={run_dir}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr

    difference = r"the draft of engine 0 is not the trainer's at .* and draft version {}: .* in 3 of 3 checks .*"
    first, last = [line for line in run.stderr.splitlines() if "sync canary" in line]
    assert re.fullmatch(
        f"skyrl-spec: warning: sync canary: {difference.format(2)}they agreed last at policy version 1 and draft "
        rf"version 1; .*; going on from {run_dir}/checkpoints/step_2 \(trainer.max_restarts\)",
        first,
    )
    assert re.fullmatch(
        f"skyrl-spec: error: sync canary: {difference.format(3)} from {run_dir}/checkpoints/step_3", last
    )
    assert json.loads(lost.read_text()) == []

    records = read_jsonl(run_dir / "metrics.jsonl")
    assert [record[names.STEP] for record in records] == [1, 2, 3]
    assert [record[names.CANARY_DRAFT] > 1e-4 for record in records] == [False, True, True]
    assert {path.name for path in (run_dir / "checkpoints").glob("step_*")} == {"step_2", "step_3"}
