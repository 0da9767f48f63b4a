"""A lock on a run's folder, so that two runs do not overwrite each other's metrics and checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from skyrl_spec.errors import ConfigError

LOCK = ".lock"
# File systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the folder, which is made if it is missing. The kernel releases the lock when the process dies.

    Folders that were made for it, and are empty at the end, are removed: nothing was written, because of a mistake.

    Raises:
        ConfigError: another process holds it.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with _held(run_dir):
            yield
    finally:
        if made and [path.name for path in run_dir.iterdir()] == [LOCK]:
            (run_dir / LOCK).unlink()
            for folder in made:
                folder.rmdir()


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    with (run_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"trainer.run_dir={run_dir}: a run is writing to this folder ({file.read().strip() or 'just started'});"
                " wait until it ends, or set another trainer.run_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"skyrl-spec: {run_dir}: its file system has no locks; start no second run in it", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield
