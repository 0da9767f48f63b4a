"""When a run saves beside training, and what it then waits for. Workers that write when they are told stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skyrl_spec.checkpoint import folders
from skyrl_spec.controller.checkpoints import Checkpointer
from skyrl_spec.errors import LostActorError, RunError
from skyrl_spec.settings.schema import Config


class Workers:
    """Workers whose files are written when ``is_written`` says so, or when somebody waits for them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_written = False
        self.error: Exception | None = None
        self.is_lost = False
        self._directory: Path | None = None

    def begin_save(self, directory: Path, extra: dict[str, Any]) -> None:
        assert self._directory is None, "one save at a time"
        self.calls.append(f"begin {directory.name}")
        self._directory = directory

    def finish_save(self, *, wait: bool) -> bool:
        assert self._directory is not None
        if not wait and not self.is_written:
            return False
        self.calls.append(f"{'wait' if wait else 'done'} {self._directory.name}")
        directory, self._directory = self._directory, None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        publish(directory)
        return True

    def check(self) -> None:
        if self.is_lost:
            raise LostActorError("policy worker 0 of 1 died")

    def export_checkpoint(self, directory: Path, target: Path) -> None:
        self.calls.append(f"export {directory.name}")

    def save_checkpoint(self, directory: Path, extra: dict[str, Any]) -> None:
        assert self._directory is None, "one save at a time"
        self.calls.append(f"save {directory.name}")
        publish(directory)


class Loop:
    def __init__(self, config: Config):
        self.config = config

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"step": step}


def publish(directory: Path) -> None:
    folders.begin(directory)
    folders.publish(directory, {"layout": {}, "parts": {}, "extra": {}})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.trainer.run_dir, config.trainer.ckpt_interval = str(tmp_path), 2
    config.trainer.policy.megatron_config.async_dist_ckpt_save = True
    return config


def checkpointer(config: Config) -> tuple[Checkpointer, Workers]:
    workers = Workers()
    return Checkpointer(Loop(config), workers), workers  # type: ignore[arg-type]


def steps(checkpointer: Checkpointer, *numbers: int) -> None:
    for step in numbers:
        checkpointer.after_step(step, {})


def test_a_save_goes_on_beside_steps_and_the_next_one_waits_for_it(config: Config, tmp_path: Path) -> None:
    saves, workers = checkpointer(config)
    steps(saves, 1, 2, 3)
    assert workers.calls == ["begin step_2"]
    assert folders.latest(tmp_path / "checkpoints") is None
    steps(saves, 4)
    assert workers.calls == ["begin step_2", "wait step_2", "begin step_4"]
    assert folders.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_2"
    workers.is_written = True
    steps(saves, 5)
    assert workers.calls[3:] == ["done step_4"]
    assert saves.saved == tmp_path / "checkpoints" / "step_4"
    # The last step of the run.
    saves.after_run()
    assert workers.calls[4:] == ["begin step_5", "wait step_5"]
    assert saves.saved == folders.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_5"


def test_sigterm_waits_for_what_is_written_and_saves_the_last_step(config: Config) -> None:
    saves, workers = checkpointer(config)
    steps(saves, 1, 2, 3)
    saved = saves.save_last()
    assert saved is not None
    assert saved.name == "step_3"
    assert workers.calls == ["begin step_2", "wait step_2", "save step_3"]
    # If it is the last step that is being written, there is no other.
    saves, workers = checkpointer(config)
    steps(saves, 1, 2)
    saved = saves.save_last()
    assert saved is not None
    assert saved.name == "step_2"
    assert workers.calls == ["begin step_2", "wait step_2"]


def test_a_write_that_fails_is_said_and_the_last_step_is_saved_all_the_same(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config.trainer.on_ckpt_failure = "warn"
    saves, workers = checkpointer(config)
    steps(saves, 1, 2, 3)
    workers.error = RunError("step_2: the checkpoint could not be written (No space left on device)")
    steps(saves, 4)
    assert "warning: step_2: the checkpoint could not be written" in capsys.readouterr().err
    assert workers.calls == ["begin step_2", "wait step_2", "begin step_4"]

    config.trainer.on_ckpt_failure = "error"
    workers.error = RunError("step_4: the checkpoint could not be written (No space left on device)")
    workers.is_written = True
    with pytest.raises(RunError, match="step_4"):
        steps(saves, 5)
    # As a run does that a scheduler stops.
    saves, workers = checkpointer(config)
    steps(saves, 1, 2, 3)
    workers.error = RunError("step_2: the checkpoint could not be written (No space left on device)")
    assert saves.save_last() == saves._directory(3)
    assert "warning: step_2" in capsys.readouterr().err


def test_a_lost_worker_ends_the_run_whatever_a_failed_save_may_cost(config: Config) -> None:
    config.trainer.on_ckpt_failure = "warn"
    saves, workers = checkpointer(config)
    steps(saves, 1, 2)
    workers.error, workers.is_written = LostActorError("policy worker 0 of 1 died"), True
    with pytest.raises(LostActorError):
        steps(saves, 3)


def test_after_an_error_what_was_begun_is_completed(config: Config, tmp_path: Path) -> None:
    saves, workers = checkpointer(config)
    steps(saves, 1, 2, 3)
    saves.finish_after_error()
    assert workers.calls == ["begin step_2", "wait step_2"]
    assert folders.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_2"
    # Nothing was begun.
    saves.finish_after_error()
    steps(saves, 4)
    workers.is_lost = True
    saves.finish_after_error()
    assert workers.calls[2:] == ["begin step_4"]


def test_a_scheduler_does_not_wait_for_exports(config: Config) -> None:
    config.trainer.hf_save_interval = 2
    saves, workers = checkpointer(config)
    steps(saves, 1, 2, 3)
    saves.save_last()
    assert workers.calls == ["begin step_2", "wait step_2", "save step_3", "export step_2"]
    workers.is_written = True
    steps(saves, 4, 5)
    assert workers.calls[4:] == ["begin step_4", "done step_4", "export step_4"]
