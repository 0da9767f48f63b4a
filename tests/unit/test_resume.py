"""What a resumed run has left to do if settings changed. tests/e2e resumes real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_spec.checkpoint import folders
from skyrl_spec.controller.folder_lock import LOCK, locked
from skyrl_spec.controller.task import Task, load_task
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.schema import Config

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 16
NOTHING_LEFT = "nothing is left to train"


def write_rows(path: Path, first: int = 0) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"1+{first + number}"}],
            "env_class": "gsm8k",
            "reward_spec": {"method": "rule", "ground_truth": str(1 + first + number)},
        }
        for number in range(NUM_ROWS)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def config_of(tmp_path: Path, *words: str, data: Path | None = None) -> Config:
    return load_config(
        [
            "experiment=cpu_mtp_grpo",
            f"trainer.policy.model.path={ROOT}/examples/arithmetic_mtp/model",
            f"data.train_data=[{data or tmp_path / 'rows.jsonl'}]",
            "data.val_data=[]",
            f"trainer.run_dir={tmp_path / 'run'}",
            "trainer.max_training_steps=null",
            "trainer.train_batch_size=4",
            "trainer.policy_mini_batch_size=4",
            *words,
        ]
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of two steps with four rows each."""
    write_rows(tmp_path / "rows.jsonl")
    task = load_task(config_of(tmp_path))
    assert task.steps == NUM_ROWS // 4
    for _ in range(2):
        task.stream.next_batch()
    directory = tmp_path / "run" / "checkpoints" / "step_2"
    folders.begin(directory)
    extra = {"trainer": {"step": 2, "stream": task.stream.state_dict()}}
    folders.publish(directory, {"layout": {}, "parts": {"policy": {}}, "extra": extra})
    return directory


def resumed(tmp_path: Path, checkpoint: Path, *words: str, data: Path | None = None) -> tuple[Task, list[str]]:
    """The task, and the uids of its next batch."""
    task = load_task(config_of(tmp_path, *words, data=data), checkpoint)
    return task, [prompt.uid for prompt in task.stream.next_batch()]


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], 4),
        (["trainer.train_batch_size=8", "trainer.policy_mini_batch_size=8"], 3),
        (["trainer.train_batch_size=2", "trainer.policy_mini_batch_size=2"], 6),
        (["trainer.policy_mini_batch_size=2"], 4),
        (["generator.n_samples_per_prompt=2"], 4),
        (["trainer.epochs=2"], 8),
        (["trainer.epochs=2", "trainer.train_batch_size=8", "trainer.policy_mini_batch_size=8"], 5),
        (["trainer.max_training_steps=3"], 3),
        (["trainer.policy.optimizer_config.scheduler=cosine"], 4),
    ],
    ids=lambda value: "-".join(word.rpartition(".")[2] for word in value) if isinstance(value, list) else None,
)
def test_steps_are_those_done_and_those_that_the_rows_allow(
    words: list[str], steps: int, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {prompt.uid for prompt in load_task(config_of(tmp_path)).stream.next_batch()}
    task, batch = resumed(tmp_path, checkpoint, *words)
    assert (task.steps_done, task.steps) == (2, steps)
    assert not before & set(batch)
    assert NOTHING_LEFT not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["trainer.max_training_steps=2"], ["trainer.max_training_steps=1"], ["trainer.train_batch_size=16"]],
    ids=["as many steps", "fewer steps", "a batch for which too few rows are left"],
)
def test_nothing_left_is_said(
    words: list[str], tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_task(config_of(tmp_path, *words), checkpoint)
    assert task.steps <= 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if NOTHING_LEFT in line)
    assert "after step 2" in line
    assert words[0].partition("=")[0] in line


def test_new_data_is_refused_or_begins_at_its_beginning(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_rows(tmp_path / "other.jsonl", first=50)
    with pytest.raises(ConfigError, match=r"other\.jsonl: its 16 prompts are not those .* \(16 of .*rows\.jsonl\)"):
        resumed(tmp_path, checkpoint, data=other)
    task, batch = resumed(tmp_path, checkpoint, "trainer.resume_with_new_data=true", data=other)
    assert (task.steps_done, task.steps) == (2, 2 + NUM_ROWS // 4)
    assert batch == [prompt.uid for prompt in load_task(config_of(tmp_path, data=other)).stream.next_batch()]
    assert "from its beginning, in place of" in capsys.readouterr().err


def test_the_setting_for_new_data_changes_nothing_with_the_old(tmp_path: Path, checkpoint: Path) -> None:
    _, batch = resumed(tmp_path, checkpoint, "trainer.resume_with_new_data=true")
    assert batch == resumed(tmp_path, checkpoint)[1]


@pytest.mark.parametrize(("room", "missing"), [(14, 0), (13, 1), (0, 14)])
def test_drafts_without_room_at_the_last_positions_are_said(
    room: int, missing: int, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two drafts of seven tokens must fit behind the longest sequence; the model has 512 positions."""
    length = 512 - 32 - room
    capsys.readouterr()
    load_task(config_of(tmp_path, f"generator.sampling_params.max_generate_length={length}"))
    lines = capsys.readouterr().err.splitlines()
    if not missing:
        assert lines == []
        return
    (line,) = lines
    assert f"max_generate_length={length}: drafts of 7 tokens need {missing} more positions" in line
    assert line.endswith(f"set it to {length - missing} or less")


HOLD = """
import sys, time
from pathlib import Path
from skyrl_spec.controller.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_run_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"{tmp_path}: a run is writing to this folder \(process {holder.pid} on"),
            locked(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / LOCK).read_text().startswith(f"process {holder.pid}")
    with locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mistake"), locked(tmp_path / "a" / "run"):
        raise ConfigError("mistake")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "metrics.jsonl").touch()
    assert sorted(path.name for path in (tmp_path / "a" / "run").iterdir()) == [LOCK, "metrics.jsonl"]
