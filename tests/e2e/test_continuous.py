"""Whole runs whose engines never stop sampling (``trainer.fully_async.max_staleness_steps=2``)."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from logging_environment import NOTES
from runs import ROOT, WHOLE, finish, records_of, start

from skyrl_spec.checkpoint.folders import read_record
from skyrl_spec.metrics import names
from skyrl_spec.settings.compose import load_config

ENVIRONMENT = "environment.custom.noted=logging_environment:NotedEnv"
RUNNING = [
    *WHOLE, ENVIRONMENT, "trainer.fully_async.enabled=true", "trainer.fully_async.max_staleness_steps=2",
    "trainer.canary.interval=1", "trainer.eval_before_train=false", "trainer.eval_interval=4",
]  # fmt: skip
# In WHOLE: 5 steps of 8 prompts with 4 responses each.
NUM_STEPS, BATCH, SAMPLES = 5, 8, 4


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path, turns=1)


def write_rows(folder: Path, turns: int) -> str:
    """The example's first 64 rows with an environment that takes notes; returns the setting that reads them."""
    (path,) = load_config(["experiment=cpu_mtp_grpo"]).data.train_data
    lines = (ROOT / path).read_text().splitlines()[:64]
    infos = [{"env_class": "noted", "extra_info": {"index": index, "turns": turns}} for index in range(len(lines))]
    new = [json.loads(line) | info for line, info in zip(lines, infos, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    return f"data.train_data=[{folder / 'rows.jsonl'}]"


def played(notes: Path) -> Counter[int]:
    """How many turns of each row were played."""
    return Counter(int(line) for line in notes.read_text().splitlines())


def assert_fresh_enough(run_dir: Path) -> None:
    records = [record for record in records_of(run_dir) if names.STALENESS in record]
    assert [record[names.POLICY_VERSION] for record in records] == list(range(1, len(records) + 1))
    assert all(0 <= record[names.STALENESS] <= 2 for record in records)
    # After a sync the engines hold what the trainer has, in the middle of their requests too.
    assert all(record[names.CANARY_POLICY] < 1e-4 for record in records)
    assert all(record[names.CANARY_DRAFT] < 1e-3 for record in records)


@pytest.mark.parametrize(
    "requests", ["recompute", *(pytest.param(other, marks=pytest.mark.slow) for other in ("keep", "wait"))]
)
def test_every_prompt_is_sampled_and_trained_on_once(requests: str, tmp_path: Path, rows: str) -> None:
    notes = tmp_path / "notes"
    output, records = finish(
        tmp_path / "run", *RUNNING, rows, f"trainer.fully_async.running_requests={requests}", **{NOTES: str(notes)}
    )
    assert "warning" not in output, output
    assert len(records) == NUM_STEPS
    assert_fresh_enough(tmp_path / "run")
    # Nothing is begun that no step would take.
    assert sorted(played(notes).values()) == [SAMPLES] * (NUM_STEPS * BATCH)
    assert max(record[names.STALENESS] for record in records) > 0
    assert all(0 <= record[names.TRAINER_IDLE] < 1 for record in records)
    assert all(0 <= record[names.ENGINES_IDLE] <= 1 for record in records)
    spans = [record[names.SPANS] for record in records]
    assert max(spans) == 1 if requests == "wait" else min(spans) >= 1
    assert names.EVAL_SCORE in records[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_that_dies_under_load_loses_no_response_and_repeats_none(tmp_path: Path, rows: str) -> None:
    notes = tmp_path / "notes"
    run = start(tmp_path / "run", *RUNNING, rows, **{NOTES: str(notes)})
    for num_records in (1, 3):
        run.wait_for_steps(num_records)
        run.actor("EngineActor.advance").kill()
    output = run.output(timeout_s=300)
    assert run.process.returncode == 0, output
    assert output.count("it is restarted, and its prompts are generated again") == 2
    assert_fresh_enough(tmp_path / "run")
    assert sorted(played(notes).values()) == [SAMPLES] * (NUM_STEPS * BATCH)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_that_hangs_is_replaced(tmp_path: Path, rows: str) -> None:
    notes = tmp_path / "notes"
    run = start(
        tmp_path / "run", *RUNNING, rows, "generator.inference_engine.generate_timeout_s=20", **{NOTES: str(notes)}
    )
    run.wait_for_steps(1)
    run.actor("EngineActor.advance").suspend()
    output = run.output(timeout_s=300)
    assert run.process.returncode == 0, output
    assert "did not answer within generator.inference_engine.generate_timeout_s=20" in output
    assert sorted(played(notes).values()) == [SAMPLES] * (NUM_STEPS * BATCH)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_knows_what_was_finished_running_and_queued(tmp_path: Path, rows: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    notes = {run_dir: tmp_path / f"{run_dir.name}_notes" for run_dir in (first, second)}
    saves = ["trainer.ckpt_interval=2", "trainer.max_ckpts_to_keep=5"]
    finish(first, *RUNNING, rows, *saves, **{NOTES: str(notes[first])})
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    path = second / "checkpoints" / "step_2"
    state = read_record(path)["extra"]["trainer"]["running"]
    done = {group["uid"] for group in state["groups"] if group["rollouts"] is not None}
    begun = {group["uid"] for group in state["groups"]} - done
    # At the end of a step the groups of two others are there, and the next ones may have begun.
    assert 2 * BATCH <= len(done | begun) <= 3 * BATCH
    finish(
        second, *RUNNING, rows, *saves, "trainer.resume_mode=from_path", f"trainer.resume_path={path}",
        **{NOTES: str(notes[second])},
    )  # fmt: skip
    again = played(notes[second])
    indices = {uid: number for number, uid in enumerate(uids(rows))}
    # What had finished is not sampled again. What ran or waited is.
    assert not {indices[uid] for uid in done} & again.keys()
    assert {indices[uid] for uid in begun | set(state["queue"])} <= again.keys()
    assert set(again.values()) == {SAMPLES}
    assert len(again) + len(done) == (NUM_STEPS - 2) * BATCH
    trained_before = played(notes[first]).keys() - {indices[uid] for uid in done | begun}
    assert not again.keys() & (trained_before - again.keys())


def uids(rows: str) -> list[str]:
    from skyrl_spec.controller.task import load_task

    task = load_task(load_config(["experiment=cpu_mtp_grpo", *RUNNING, rows]), None)
    return [prompt.uid for prompt in task.stream.prompts]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_saves_at_the_end_of_the_step(tmp_path: Path, rows: str) -> None:
    run = start(tmp_path / "run", *RUNNING, rows, "trainer.max_training_steps=50", **{NOTES: str(tmp_path / "notes")})
    run.wait_for_steps(2)
    run.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output = run.output(timeout_s=120)
    assert run.process.returncode == 0, output
    assert time.monotonic() - began < 30
    assert "SIGTERM: saved" in output
    assert run.processes() == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_conversations_of_several_turns_go_on_across_syncs(tmp_path: Path) -> None:
    rows, notes = write_rows(tmp_path, turns=2), tmp_path / "notes"
    several = ["generator.max_turns=3", "generator.max_input_length=280"]
    output, records = finish(tmp_path / "run", *RUNNING, rows, *several, **{NOTES: str(notes)})
    assert "warning" not in output, output
    assert_fresh_enough(tmp_path / "run")
    # A response that was cut has no second turn.
    assert set(played(notes)) == set(range(64)) or len(played(notes)) == NUM_STEPS * BATCH
    assert all(SAMPLES <= count <= 2 * SAMPLES for count in played(notes).values())
    assert all(1 < record[names.NUM_TURNS] <= 2 for record in records)
