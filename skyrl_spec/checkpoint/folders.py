"""Directories of checkpoints: publishing, finding the newest, and removing old ones. Needs no torch and no Megatron.

    root/step_N             complete checkpoint; it got its name by one rename, when all its files were on disk
    root/step_N.partial     checkpoint that is being written, or remains of a save that was killed
    root/step_N.replaced    former step_N, while a new one takes its name
    root/step_N.removing    checkpoint that is being removed
    root/latest             file with the name of the checkpoint that was saved last
    root.earlierN           checkpoints of an earlier run in the same folder

One process at a time writes below a root. Any number may read.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from skyrl_spec.errors import ConfigError

RECORD = "checkpoint.json"
LATEST = "latest"
FORMAT = 1

_STEP = re.compile(r"step_(\d+)")
_PARTIAL, _REPLACED, _REMOVING, _EARLIER = ".partial", ".replaced", ".removing", ".earlier"


def latest(root: Path) -> Path | None:
    """Newest complete checkpoint below ``root``, or None.

    It is the one that the file ``latest`` names. If this file is missing or names no complete checkpoint, it is the
    complete checkpoint that was saved last.
    """
    complete = _complete(root)
    try:
        named = (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    if named in complete:
        return complete[named]
    return max(complete.values(), key=_saved_at) if complete else None


def rotate(root: Path, keep: int) -> list[str]:
    """Removes the oldest complete checkpoints beyond ``keep``, and remains of saves and removals that were killed.

    The checkpoint that ``latest`` returns always stays. ``keep`` below 1 keeps all. Call it after a save, from one
    process.

    Returns:
        One line for each path that could not be removed. All others are removed.
    """
    complete, newest = _complete(root), latest(root)
    by_age = sorted((path for path in complete.values() if path != newest), key=_saved_at)
    outdated = by_age[: max(0, len(complete) - keep)] if keep >= 1 else []
    leftovers = [
        path
        for suffix in (_PARTIAL, _REMOVING, _REPLACED)
        for path in sorted(root.glob(f"*{suffix}"))
        if _is_ours(path, suffix) and path not in complete.values()
    ]
    lines = []
    for path in [*leftovers, *outdated]:
        try:
            _remove(path)
        except OSError as error:
            lines.append(f"{path} could not be removed ({error.strerror or error}); remove it by hand")
    return lines


def set_aside(root: Path) -> Path | None:
    """Moves the checkpoints of an earlier run aside and returns their new place; None if there are none.

    A new run then neither removes them nor takes them for its own.
    """
    if latest(root) is None:
        return None
    names = (f"{root.name}{_EARLIER}{number}" for number in itertools.count(1))
    return root.rename(next(path for path in map(root.with_name, names) if not path.exists()))


def name_latest(directory: Path) -> None:
    """Makes the file ``latest`` name ``directory``, atomically."""
    root = directory.parent
    named = root / (LATEST + _PARTIAL)
    write_synced(named, f"{directory.name}\n".encode())
    named.replace(root / LATEST)
    _sync(root)


def contents(directory: Path) -> set[str]:
    """Components of the checkpoint: ``policy``, ``draft``.

    Raises:
        ConfigError: ``directory`` is not a complete checkpoint.
    """
    return set(read_record(directory)["parts"])


def read_record(directory: Path, setting: str = "trainer.resume_path") -> dict[str, Any]:
    """Record that ``publish`` wrote, checked against the checkpoint's files. Errors name ``setting``.

    Raises:
        ConfigError: ``directory`` is missing, not a checkpoint, or incomplete.
    """
    setting = f"{setting}={directory}"
    if not directory.is_dir():
        raise ConfigError(f"{setting}: no such directory; name a checkpoint (RUN/checkpoints/step_N)")
    try:
        record = json.loads((directory / RECORD).read_bytes())
        record_format, files = record["format"], record["files"]
        has_all_keys = {"parts", "layout", "saved_at", "extra"} <= record.keys()
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: is no checkpoint of skyrl_spec (no {RECORD}); name one (RUN/checkpoints/step_N)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{setting}: {RECORD} cannot be read ({error}); take another checkpoint") from None
    if record_format != FORMAT or not has_all_keys:
        raise ConfigError(
            f"{setting}: {RECORD} has format {record_format!r}, this version reads {FORMAT}; "
            "use the version that wrote it, or another checkpoint"
        )
    for name, size in files.items():
        try:
            actual_size = (directory / name).stat().st_size
        except OSError:
            raise ConfigError(f"{setting}: {name} is missing; take another checkpoint") from None
        if actual_size != size:
            raise ConfigError(f"{setting}: {name} has {actual_size} bytes, not {size}; take another checkpoint")
    return record


def begin(directory: Path) -> None:
    """Makes the empty directory ``partial(directory)``, in which a checkpoint is written."""
    assert _STEP.fullmatch(directory.name), f"{directory.name} is no step_N"
    shutil.rmtree(partial(directory), ignore_errors=True)
    partial(directory).mkdir(parents=True)


def partial(directory: Path) -> Path:
    """Path under which the checkpoint ``directory`` is written."""
    return directory.with_name(directory.name + _PARTIAL)


def publish(directory: Path, record: dict[str, Any]) -> None:
    """Renames the finished ``partial(directory)`` to ``directory``, which it replaces, and makes ``latest`` name it.

    ``record`` is plain data about the checkpoint, for ``read_record``. If the process dies at any time, the new
    checkpoint exists as a whole or not at all, and so does the one that it replaces.
    """
    source, replaced, root = partial(directory), directory.with_name(directory.name + _REPLACED), directory.parent
    files = {str(path.relative_to(source)): path.stat().st_size for path in source.rglob("*") if path.is_file()}
    full = {"format": FORMAT, "saved_at": time.time_ns(), **record, "files": files}
    write_synced(source / RECORD, json.dumps(full).encode())
    for path in [*source.rglob("*"), source]:
        _sync(path)
    if is_complete(directory):
        if replaced.exists():
            _remove(replaced)
        directory.rename(replaced)
    elif directory.exists():
        _remove(directory)
    source.rename(directory)
    _sync(root)
    name_latest(directory)
    # The checkpoint is complete. ``rotate`` tries a failed removal again and reports it.
    with suppress(OSError):
        if replaced.exists():
            _remove(replaced)


def discard(directory: Path) -> None:
    """Removes the remains of a save that failed."""
    shutil.rmtree(partial(directory), ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _complete(root: Path) -> dict[str, Path]:
    """Complete checkpoints by name.

    A replaced checkpoint counts as long as no complete checkpoint has its name.
    """
    checkpoints: dict[str, Path] = {}
    for suffix in (_REPLACED, ""):
        for path in root.glob(f"step_*{suffix}"):
            if _is_ours(path, suffix) and is_complete(path):
                checkpoints[path.name.removesuffix(suffix)] = path
    return checkpoints


def is_complete(directory: Path) -> bool:
    """Whether ``directory`` is a checkpoint with all its files."""
    try:
        read_record(directory)
    except ConfigError:
        return False
    return True


def _is_ours(path: Path, suffix: str) -> bool:
    stem = path.name.removesuffix(suffix)
    return _STEP.fullmatch(stem) is not None or (stem == LATEST and suffix == _PARTIAL)


def _saved_at(directory: Path) -> int:
    return read_record(directory)["saved_at"]


def _remove(path: Path) -> None:
    """Removes a file or directory. A directory is renamed first, so that no step_N is ever half removed."""
    if path.is_file():
        path.unlink()
        return
    if not path.name.endswith((_PARTIAL, _REMOVING)):
        # An earlier removal that was killed may have left this name.
        target = path.with_name(path.name.removesuffix(_REPLACED) + _REMOVING)
        shutil.rmtree(target, ignore_errors=True)
        path = path.rename(target)
    shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
