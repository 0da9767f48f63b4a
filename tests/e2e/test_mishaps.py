"""Whole runs with a full disk and a failing environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from moody_environment import HUNG, RAISES_ON
from runs import ROOT, SMALL, records_of, small_disk, start

from skyrl_spec.metrics import names


def moody_rows(path: Path) -> Path:
    """Eight rows of the example, which form every batch."""
    rows = (ROOT / "examples/arithmetic_mtp/data/train.jsonl").read_text().splitlines()[:8]
    path.write_text("".join(json.dumps(json.loads(row) | {"env_class": "moody"}) + "\n" for row in rows))
    return path


def moody(tmp_path: Path) -> list[str]:
    return [
        "experiment=cpu_mtp_grpo",
        *SMALL,
        "trainer.eval_before_train=false",
        "trainer.eval_interval=0",
        "trainer.ckpt_interval=1",
        "trainer.epochs=10",
        f"data.train_data=[{moody_rows(tmp_path / 'rows.jsonl')}]",
        "environment.custom.moody=moody_environment:MoodyEnv",
        "environment.timeout_s=2",
    ]


@pytest.mark.slow
def test_a_run_with_a_full_disk_and_a_failing_environment_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*moody(tmp_path), "trainer.on_ckpt_failure=warn", "environment.max_failed_share=0.2"]
    prefix = small_disk(run_dir / "checkpoints")
    if not prefix:
        pytest.skip("needs user namespaces (unshare) that may mount a tmpfs")
    run = start(run_dir, *overrides, prefix=prefix, **{HUNG: str(tmp_path / "hung")})
    output = run.output(timeout_s=300)
    assert run.process.returncode == 0, output
    assert run.processes() == []
    first, second = records_of(run_dir)
    # Four responses to the row that raises, and one that hangs.
    assert (first[names.NUM_FAILED], second[names.NUM_FAILED]) == (5, 4)
    where = "skyrl-spec: warning: a response could not be scored and gets reward 0: row"
    assert f"{where} {RAISES_ON}, env_class moody: ZeroDivisionError: by nothing" in output
    assert "skyrl-spec: warning: and 2 more of this batch" in output
    warning = f"skyrl-spec: warning: {run_dir}/checkpoints/step_2: the checkpoint could not be written (No space left"
    assert output.count(warning) == 1
    assert "earlier ones are as they were" in output
    assert "Traceback" not in output, output
    # The shell lists the disk at the end.
    assert output.splitlines()[-2:] == ["latest", "step_1"]
    assert (run_dir / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mishap", "expected"),
    [
        (
            lambda _: ["environment.max_failed_share=0.1"],
            "environment.max_failed_share=0.1: 5 of 32 responses could not",
        ),
        (lambda _: ["environment.max_failed_share=1"], "step_2: the checkpoint could not be written (No space left on"),
    ],
    ids=["environment", "disk"],
)
def test_a_run_that_may_not_go_on_ends_with_a_line(
    mishap: Callable[[Path], list[str]], expected: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    prefix = small_disk(run_dir / "checkpoints")
    if not prefix:
        pytest.skip("needs user namespaces (unshare) that may mount a tmpfs")
    run = start(run_dir, *moody(tmp_path), *mishap(tmp_path), prefix=prefix, **{HUNG: str(tmp_path / "hung")})
    output = run.output(timeout_s=300)
    assert run.process.returncode == 1, output
    assert run.processes() == []
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("skyrl-spec: error: ")]
    assert expected in line
