"""Runs whose engines sleep while workers train, and whose workers offload while engines sample: a stand-in on CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from runs import ROOT, SMALL, assert_same_records, assert_same_weights, finish, launch, records_of

from skyrl_spec.metrics import names

OFFLOAD = [
    "trainer.policy.optimizer_config.offload_after_step=true",
    "trainer.mtp.optimizer_config.offload_after_step=true",
    "trainer.policy.megatron_config.cpu_offload=true",
    "trainer.ref.cpu_offload=true",
]
# The draft is trained in every second step, so that a sync without a new draft comes too. With every canary.
SETTINGS = ["experiment=cpu_mtp_grpo", *SMALL, "trainer.algorithm.use_kl_loss=true", "trainer.draft.train=every:2"]
SETTINGS += ["trainer.mtp.num_speculative_tokens=3", "trainer.canary.interval=1", "trainer.eval_interval=2"]


def _run(run_dir: Path, level: int, *overrides: str, mistake: str = "", succeeds: bool = True) -> str:
    """Output of a run with engines that sleep at this level."""
    script = Path(__file__).with_name("shared_run.py")
    words = [sys.executable, str(script), "train", *SETTINGS, *OFFLOAD, *overrides, f"trainer.run_dir={run_dir}"]
    paths = ":".join(str(ROOT / "tests" / folder) for folder in ("rollout", "e2e"))
    environment = {"SKYRL_SPEC_TEST_LEVEL": str(level), "SKYRL_SPEC_TEST_MISTAKE": mistake, "PYTHONPATH": paths}
    run = launch(run_dir, words, **environment)
    output = run.output(300)
    assert (run.process.returncode == 0) == succeeds, output
    assert run.processes() == []
    return output


@pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_taking_turns_changes_no_bit_of_a_run(tmp_path: Path, level: int) -> None:
    """Also across a resume, at whose start the engines sleep."""
    _, expected = finish(tmp_path / "plain", *SETTINGS, "trainer.max_training_steps=4", "trainer.ckpt_interval=2")
    if level == 2:
        # Every sync brings the draft.
        expected = [{key: value for key, value in record.items() if key != names.SYNC_BYTES} for record in expected]
    run_dir = tmp_path / "run"
    _run(run_dir, level, "trainer.max_training_steps=2", "trainer.ckpt_interval=2")
    _run(run_dir, level, "trainer.max_training_steps=4", "trainer.ckpt_interval=2")
    records = records_of(run_dir)
    assert len({record.pop(names.SYNC_BYTES) for record in records if record[names.STEP]}) == (1 if level == 2 else 2)
    assert_same_records(records, expected)
    assert_same_weights(run_dir, tmp_path / "plain")
    assert all(record[names.timing("moves")] > 0 for record in records if record[names.STEP])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "words"),
    {
        "no draft": "no sync has brought its draft",
        "keys first": "keys are told to wake before its weights",
        "asleep": "weights are sent to an engine that sleeps",
    }.items(),
)
def test_a_mistake_ends_the_run(tmp_path: Path, mistake: str, words: str) -> None:
    assert words in _run(tmp_path / "run", 2, mistake=mistake, succeeds=False)


def test_a_draft_that_is_lost_unseen_is_seen_by_the_canary(tmp_path: Path) -> None:
    """With the engines' own check taken away: outputs stay right, and the canary says which side lost what."""
    output = _run(tmp_path / "run", 2, mistake="no check", succeeds=False)
    assert "sync canary: the draft of engine 0 is not the trainer's" in output
