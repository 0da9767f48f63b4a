"""Processes of a local Ray, and how they end."""

from __future__ import annotations

import os
import select
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

from ray._private import services


@contextmanager
def servers_in_own_sessions() -> Iterator[list[Popen[bytes]]]:
    """Gives each of Ray's servers that starts in this context a session of its own, out of this process's group.

    A terminal, ``timeout`` and schedulers signal the whole group. The kernel still ends the servers with this process.
    The list grows by each server.
    """
    # Ray has no option for it.
    module: Any = services
    popen, servers = module.ConsolePopen, list[Popen[bytes]]()

    def start(*args: Any, **options: Any) -> Popen[bytes]:
        servers.append(popen(*args, start_new_session=True, **options))
        return servers[-1]

    module.ConsolePopen = start
    try:
        yield servers
    finally:
        module.ConsolePopen = popen


def open_tree(roots: Iterable[int]) -> list[int]:
    """Pidfds of the processes ``roots`` and of all their descendants.

    A pidfd refers to one process for ever, while the kernel may give a process id to another.
    """
    children = defaultdict(list)
    for pid, parent in _parents().items():
        children[parent].append(pid)
    pids, pidfds = list(roots), []
    # Grows while it is read.
    for pid in pids:
        pids += children[pid]
        with suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))
    return pidfds


def kill_all(pidfds: list[int], timeout_s: float = 5.0) -> None:
    """Kills the processes of ``pidfds``, waits until they have ended, and closes ``pidfds``."""
    for pidfd in pidfds:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    for pidfd in pidfds:
        ended = select.poll()
        # Readable once the process has ended.
        ended.register(pidfd, select.POLLIN)
        ended.poll(1000 * max(0.0, deadline - time.monotonic()))
        os.close(pidfd)


def _parents() -> dict[int, int]:
    """Parent of each process of this machine."""
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # The name before the parenthesis may hold anything: "pid (name) state parent ...".
            parents[int(directory.name)] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
    return parents
