"""Checkpoint directories without tensors: atomic saves under kills at every moment, rotation and errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_spec.checkpoint import folders
from skyrl_spec.controller.checkpoints import begin, newest
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.compose import load_config

FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir")


def save(root: Path, step: int, payload: str = "first") -> Path:
    directory = root / f"step_{step}"
    folders.begin(directory)
    folders.write_synced(folders.partial(directory) / "tensors", payload.encode())
    folders.publish(directory, {"layout": {}, "parts": {"policy": {}}, "extra": {"payload": payload}})
    return directory


def payload(directory: Path) -> str:
    """Content of a checkpoint whose files all belong to one save."""
    text = (directory / "tensors").read_text()
    assert folders.read_record(directory)["extra"]["payload"] == text
    return text


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def dies_at(moment: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a process that dies before file operation ``moment``; False if ``action`` finished."""
    child = os.fork()
    if child == 0:
        left = moment

        def hook(event: str, args: object) -> None:
            nonlocal left
            if event in FILE_EVENTS:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_killed_at_every_moment_of_a_save_and_a_rotation(tmp_path: Path) -> None:
    def action(root: Path) -> None:
        save(root, 2, "second")
        save(root, 3, "second")
        folders.rotate(root, keep=1)

    moment = 0
    while True:
        root = tmp_path / str(moment)
        save(root, 1), save(root, 2)
        died = dies_at(moment, lambda root=root: action(root))
        newest = folders.latest(root)
        assert newest is not None, moment
        assert payload(newest) in ("first", "second")
        assert newest.name.startswith(("step_2", "step_3")), moment
        if newest.name == "step_3":
            assert payload(newest) == "second"
        if not died:
            break
        # The next save and rotation work with any remains, and remove them.
        save(root, 3, "third")
        assert folders.latest(root) == root / "step_3"
        assert folders.rotate(root, keep=1) == []
        assert names(root) == {"step_3", "latest"}, moment
        assert payload(root / "step_3") == "third"
        moment += 1
    assert moment > 30, "the moments were not counted"
    assert names(root) == {"step_3", "latest"}


def test_a_checkpoint_moved_aside_counts_while_nothing_has_its_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_1").rename(tmp_path / "step_1.replaced")
    assert folders.latest(tmp_path) == tmp_path / "step_1.replaced"
    assert folders.rotate(tmp_path, keep=1) == []
    assert folders.latest(tmp_path) == tmp_path / "step_1.replaced"
    save(tmp_path, 1, "second")
    assert names(tmp_path) == {"step_1", "latest"}


@pytest.mark.parametrize("content", [None, b"", b"step_9\n", b"../step_1\n", b"\xff\xfe"])
def test_latest_without_a_good_file(tmp_path: Path, content: bytes | None) -> None:
    assert folders.latest(tmp_path / "nothing") is None
    save(tmp_path, 1), save(tmp_path, 10), save(tmp_path, 9)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert folders.latest(tmp_path) == tmp_path / "step_9", "the one saved last"


def test_latest_passes_over_what_is_not_complete(tmp_path: Path) -> None:
    save(tmp_path, 1), save(tmp_path, 2), save(tmp_path, 3)
    (tmp_path / "step_3" / "tensors").write_text("cut")
    assert folders.latest(tmp_path) == tmp_path / "step_2"
    (tmp_path / "step_2" / "checkpoint.json").unlink()
    assert folders.latest(tmp_path) == tmp_path / "step_1"
    # A damaged checkpoint is replaced too.
    save(tmp_path, 2, "second")
    assert payload(tmp_path / "step_2") == "second"


def test_rotation_keeps_the_last_saved(tmp_path: Path) -> None:
    # Step 2 after step 4: a run that resumed from an older checkpoint.
    for step in (1, 3, 4, 2):
        save(tmp_path, step)
    (tmp_path / "step_7.partial").mkdir()
    (tmp_path / "notes.partial").mkdir()
    (tmp_path / "step_8.removing").mkdir()
    assert folders.rotate(tmp_path, keep=0) == []
    assert names(tmp_path) == {"step_1", "step_2", "step_3", "step_4", "latest", "notes.partial"}
    assert folders.rotate(tmp_path, keep=2) == []
    assert names(tmp_path) == {"step_4", "step_2", "latest", "notes.partial"}
    assert folders.latest(tmp_path) == tmp_path / "step_2"


def test_a_removal_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)

    def refuse(path: Path) -> None:
        if path.name.startswith("step_1"):
            raise PermissionError(13, "Permission denied")
        real(path)

    real = folders._remove
    monkeypatch.setattr(folders, "_remove", refuse)
    (line,) = folders.rotate(tmp_path, keep=1)
    assert line == f"{tmp_path / 'step_1'} could not be removed (Permission denied); remove it by hand"
    assert names(tmp_path) == {"step_1", "step_3", "latest"}


def _not_there(directory: Path) -> Path:
    return directory.with_name("step_9")


def _no_checkpoint(directory: Path) -> Path:
    (directory / "checkpoint.json").unlink()
    return directory


def _not_json(directory: Path) -> Path:
    (directory / "checkpoint.json").write_text("{")
    return directory


def _a_list(directory: Path) -> Path:
    (directory / "checkpoint.json").write_text("[]")
    return directory


def _other_format(directory: Path) -> Path:
    record = json.loads((directory / "checkpoint.json").read_text())
    (directory / "checkpoint.json").write_text(json.dumps(record | {"format": 2}))
    return directory


def _missing_file(directory: Path) -> Path:
    (directory / "tensors").unlink()
    return directory


def _cut_file(directory: Path) -> Path:
    (directory / "tensors").write_text("fir")
    return directory


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_not_there, "no such directory"),
        (_no_checkpoint, "is no checkpoint of skyrl_spec"),
        (_not_json, "checkpoint.json cannot be read"),
        (_a_list, "checkpoint.json cannot be read"),
        (_other_format, "has format 2, this version reads 1"),
        (_missing_file, "tensors is missing"),
        (_cut_file, "tensors has 3 bytes, not 5"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, harm: Callable[[Path], Path], says: str) -> None:
    directory = harm(save(tmp_path, 1))
    with pytest.raises(ConfigError) as raised:
        folders.contents(directory)
    message = str(raised.value)
    assert message.startswith(f"trainer.resume_path={directory}: ")
    assert says in message
    assert "\n" not in message


def test_contents(tmp_path: Path) -> None:
    assert folders.contents(save(tmp_path, 1)) == {"policy"}


def test_a_run_that_begins_sets_the_checkpoints_of_an_earlier_one_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config([f"trainer.run_dir={tmp_path}"])
    root = tmp_path / "checkpoints"
    begin(config, None)
    assert (capsys.readouterr().err, list(tmp_path.iterdir())) == ("", [])
    for number in (1, 2):
        payloads = [save(root, step, f"run {number}") for step in (8, 9)]
        begin(config, None)
        earlier = tmp_path / f"checkpoints.earlier{number}"
        assert f"the checkpoints of an earlier run are in {earlier} now" in capsys.readouterr().err
        assert newest(config) is None
        assert [payload(earlier / path.name) for path in payloads] == [f"run {number}"] * 2
    # A run that resumes from one of these checkpoints: they are not its own, and they stay.
    save(root, 5)
    begin(config, tmp_path / "checkpoints.earlier1" / "step_8")
    assert newest(config) is None
    assert payload(tmp_path / "checkpoints.earlier1" / "step_8") == "run 1"


def test_a_run_that_goes_back_in_its_own_folder_has_what_it_goes_on_from_as_its_newest(tmp_path: Path) -> None:
    config = load_config([f"trainer.run_dir={tmp_path}"])
    older, newer = (save(tmp_path / "checkpoints", step) for step in (3, 9))
    assert newest(config) == newer
    begin(config, older)
    assert newest(config) == older
    assert folders.is_complete(newer)
