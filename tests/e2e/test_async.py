"""Whole runs whose next batch is sampled while the workers train."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from moody_environment import SlowEnv
from runs import ROOT, WHOLE, assert_same_run, finish, records_of, start

from skyrl_spec.metrics import names
from skyrl_spec.settings.compose import load_config

ASYNC = [*WHOLE, "trainer.fully_async.enabled=true", "trainer.canary.interval=1", "trainer.eval_before_train=false"]


def test_batches_come_from_the_weights_of_the_step_before(tmp_path: Path) -> None:
    output, records = finish(tmp_path / "run", *ASYNC, "trainer.max_training_steps=3", "trainer.eval_interval=2")
    assert "warning" not in output, output
    assert [record[names.STALENESS] for record in records] == [0, 1, 1]
    assert [record[names.POLICY_VERSION] for record in records] == [1, 2, 3]
    # Engines hold what the trainer has after every sync, but a batch is not of it.
    assert all(record[names.CANARY_POLICY] < 1e-4 for record in records)
    assert records[0][names.LOGPROBS_DIFF] < 1e-4
    assert all(record[names.LOGPROBS_DIFF] > 1e-3 for record in records[1:])
    assert [names.EVAL_SCORE in record for record in records] == [False, True, True]
    # The last step has no batch beside it.
    assert [names.ENGINES_IDLE in record for record in records] == [True, True, False]
    for record in records[:2]:
        assert 0 < record[names.ENGINES_IDLE] < 1
        assert 0 < record[names.TRAINER_IDLE] < 1
    assert len(prompts_by_step(tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_engine_that_dies_beside_training_costs_nothing_and_a_checkpoint_goes_on_with_the_next_prompts(
    tmp_path: Path,
) -> None:
    """A new engine gets the weights of the last sync, not those that the workers have in the middle of a step."""
    quiet, killed, resumed = (tmp_path / name for name in ("quiet", "killed", "resumed"))
    saves = ["trainer.ckpt_interval=2", "trainer.max_ckpts_to_keep=5"]
    finish(quiet, *ASYNC, *saves)
    run = start(killed, *ASYNC, *saves)
    for num_records in (1, 3):
        run.wait_for_steps(num_records)
        run.actor("EngineActor.advance").kill()
    output = run.output(timeout_s=300)
    assert run.process.returncode == 0, output
    assert output.count("it is restarted, and its prompts are generated again") == 2
    assert_same_run(killed, (quiet, records_of(quiet)))

    shutil.copytree(quiet / "checkpoints", resumed / "checkpoints")
    path = resumed / "checkpoints" / "step_2"
    finish(resumed, *ASYNC, *saves, "trainer.resume_mode=from_path", f"trainer.resume_path={path}")
    # The batch that was sampled beside step 2 is sampled again, with newer weights.
    assert [record[names.STALENESS] for record in records_of(resumed)] == [0, 1, 1]
    assert prompts_by_step(resumed) == {
        step: prompts for step, prompts in prompts_by_step(quiet).items() if step not in (1, 2)
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_preempted_does_not_wait_for_the_batch_beside_it(tmp_path: Path) -> None:
    """The batch for step 3 takes a minute, because its environments are slow."""
    path = load_config(["experiment=cpu_mtp_grpo"]).data.train_data[0]
    rows = [json.loads(row) | {"env_class": "slow"} for row in (ROOT / path).read_text().splitlines()[:64]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = start(
        tmp_path / "run", *ASYNC, f"data.train_data=[{tmp_path / 'rows.jsonl'}]",
        "environment.custom.slow=moody_environment:SlowEnv", "trainer.eval_interval=0",
        **{SlowEnv.VARIABLE: str(tmp_path / "slow")},
    )  # fmt: skip
    run.wait_for_steps(1)
    (tmp_path / "slow").touch()
    # Training takes less.
    time.sleep(15)
    run.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output = run.output(timeout_s=120)
    assert run.process.returncode == 0, output
    assert time.monotonic() - began < 30
    assert f"SIGTERM: saved {tmp_path}/run/checkpoints/step_2" in output
    assert len(records_of(tmp_path / "run")) == 2
    assert run.processes() == []
    (tmp_path / "slow").unlink()
    output, records = finish(
        tmp_path / "run",
        *ASYNC,
        f"data.train_data=[{tmp_path / 'rows.jsonl'}]",
        "environment.custom.slow=moody_environment:SlowEnv",
        "trainer.eval_interval=0",
        "trainer.resume_mode=latest",
        **{SlowEnv.VARIABLE: str(tmp_path / "slow")},
    )
    assert [record[names.POLICY_VERSION] for record in records] == [1, 2, 3, 4, 5]


def prompts_by_step(run_dir: Path) -> dict[int, list[Any]]:
    """Prompts of the samples of each training step."""
    found: dict[int, list[Any]] = {}
    for line in (run_dir / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        if sample.get("kind", "train") == "train":
            found.setdefault(sample["step"], []).append(sample["prompt"])
    return found
