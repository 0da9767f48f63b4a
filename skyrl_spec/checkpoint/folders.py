"""Where checkpoints lie: how one becomes visible, which is the newest, which go. Needs neither torch nor Megatron.

    root/step_N             a checkpoint, complete: it got its name by one rename, when everything in it was on disk
    root/step_N.partial     being written, or what a killed save left
    root/step_N.replaced    the former step_N, from the moment before a new one takes its name until it is removed
    root/step_N.removing    on its way out
    root/latest             the name of the one saved last
    root.earlierN           all of this, of earlier runs in the same folder

One process at a time writes below a root; any number may read.
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
    """The newest complete checkpoint below ``root``, None if there is none.

    That is the one the file ``latest`` names; where this file is missing or names something that is not complete, the
    complete one that was saved last.
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
    """Remove the complete checkpoints saved first, beyond ``keep`` of them, and what killed saves and removals left.

    The one ``latest`` returns always stays; ``keep`` below 1 keeps all. Call it after a save, from one process.

    Returns:
        One line for each thing that could not be removed; the rest is removed all the same.
    """
    complete, newest = _complete(root), latest(root)
    by_age = sorted((path for path in complete.values() if path != newest), key=_saved_at)
    going = by_age[: max(0, len(complete) - keep)] if keep >= 1 else []
    leftovers = [
        path
        for suffix in (_PARTIAL, _REMOVING, _REPLACED)
        for path in sorted(root.glob(f"*{suffix}"))
        if _is_ours(path, suffix) and path not in complete.values()
    ]
    lines = []
    for path in [*leftovers, *going]:
        try:
            _remove(path)
        except OSError as error:
            lines.append(f"{path} could not be removed ({error.strerror or error}); remove it by hand")
    return lines


def set_aside(root: Path) -> Path | None:
    """Move the checkpoints of an earlier run out of the way of one that begins; returns their new place, if any.

    So they are neither rotated away nor taken for the new run's.
    """
    if latest(root) is None:
        return None
    names = (f"{root.name}{_EARLIER}{number}" for number in itertools.count(1))
    return root.rename(next(path for path in map(root.with_name, names) if not path.exists()))


def name_latest(directory: Path) -> None:
    """Let ``latest`` name this one, in one step."""
    root = directory.parent
    named = root / (LATEST + _PARTIAL)
    write_synced(named, f"{directory.name}\n".encode())
    named.replace(root / LATEST)
    _sync(root)


def contents(directory: Path) -> set[str]:
    """Names of what the checkpoint holds: ``policy``, ``draft``.

    Raises:
        ConfigError: ``directory`` is no complete checkpoint.
    """
    return set(read_record(directory)["parts"])


def read_record(directory: Path, setting: str = "trainer.resume_path") -> dict[str, Any]:
    """What ``publish`` wrote about the checkpoint that ``setting`` names, checked against the files that are there.

    Raises:
        ConfigError: it is not there, is no checkpoint, or not complete.
    """
    setting = f"{setting}={directory}"
    if not directory.is_dir():
        raise ConfigError(f"{setting}: no such directory; name a checkpoint (RUN/checkpoints/step_N)")
    try:
        record = json.loads((directory / RECORD).read_bytes())
        form, files = record["format"], record["files"]
        present = {"parts", "layout", "saved_at", "extra"} <= record.keys()
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: is no checkpoint of skyrl_spec (no {RECORD}); name one (RUN/checkpoints/step_N)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{setting}: {RECORD} cannot be read ({error}); take another checkpoint") from None
    if form != FORMAT or not present:
        raise ConfigError(
            f"{setting}: {RECORD} has format {form!r}, this version reads {FORMAT}; "
            "use the version that wrote it, or another checkpoint"
        )
    for name, size in files.items():
        try:
            found = (directory / name).stat().st_size
        except OSError:
            raise ConfigError(f"{setting}: {name} is missing; take another checkpoint") from None
        if found != size:
            raise ConfigError(f"{setting}: {name} has {found} bytes, not {size}; take another checkpoint")
    return record


def begin(directory: Path) -> None:
    """Make the empty directory ``partial(directory)`` to write into."""
    assert _STEP.fullmatch(directory.name), f"{directory.name} is no step_N"
    shutil.rmtree(partial(directory), ignore_errors=True)
    partial(directory).mkdir(parents=True)


def partial(directory: Path) -> Path:
    """The name under which ``directory`` is written."""
    return directory.with_name(directory.name + _PARTIAL)


def publish(directory: Path, record: dict[str, Any]) -> None:
    """Give what lies complete in ``partial(directory)`` its name, in place of a former one, and let ``latest`` name it.

    ``record`` is plain data about the checkpoint, for ``read_record``. Whenever the process dies, the checkpoint
    is there whole or not at all, and so is the one it replaces.
    """
    source, former, root = partial(directory), directory.with_name(directory.name + _REPLACED), directory.parent
    files = {str(path.relative_to(source)): path.stat().st_size for path in source.rglob("*") if path.is_file()}
    full = {"format": FORMAT, "saved_at": time.time_ns(), **record, "files": files}
    write_synced(source / RECORD, json.dumps(full).encode())
    for path in [*source.rglob("*"), source]:
        _sync(path)
    if is_complete(directory):
        if former.exists():
            _remove(former)
        directory.rename(former)
    elif directory.exists():
        _remove(directory)
    source.rename(directory)
    _sync(root)
    name_latest(directory)
    # The checkpoint is there: what cannot be removed now, ``rotate`` tries again and says.
    with suppress(OSError):
        if former.exists():
            _remove(former)


def discard(directory: Path) -> None:
    """Give back the space of a save that failed."""
    shutil.rmtree(partial(directory), ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _complete(root: Path) -> dict[str, Path]:
    """Complete checkpoints by name. One that was moved aside still counts while nothing complete has its name."""
    found: dict[str, Path] = {}
    for suffix in (_REPLACED, ""):
        for path in root.glob(f"step_*{suffix}"):
            if _is_ours(path, suffix) and is_complete(path):
                found[path.name.removesuffix(suffix)] = path
    return found


def is_complete(directory: Path) -> bool:
    """Whether ``directory`` is a checkpoint with everything in it."""
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
    """Rename first: a removal that is cut short must not leave half a checkpoint under a name that counts."""
    if path.is_file():
        path.unlink()
        return
    if not path.name.endswith((_PARTIAL, _REMOVING)):
        # A former removal that was cut short may have left this name.
        target = path.with_name(path.name.removesuffix(_REPLACED) + _REMOVING)
        shutil.rmtree(target, ignore_errors=True)
        path = path.rename(target)
    shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
