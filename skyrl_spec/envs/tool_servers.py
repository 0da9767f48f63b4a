"""Servers that environments use (``environment.servers``): a run starts them first, and ends them last."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_spec.envs.env_process import end_with_parent
from skyrl_spec.errors import ConfigError, RunError

_SETTING = "environment.servers"
# Longest time for a server to answer at first, and to end.
_START_S, _END_S = 120.0, 5.0
_LOOK_S, _ANSWER_S = 0.2, 5.0


@dataclass(frozen=True)
class ToolServer:
    """A process that this run started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def require_running(self) -> None:
        """Raises RunError if it has ended."""
        if (status := self.process.poll()) is not None:
            raise RunError(f"{_SETTING}.{self.name}: ended with status {status}; {self.log} has what it printed")

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running_servers(servers: Mapping[str, Any], run_dir: Path) -> Iterator[list[ToolServer]]:
    """Context in which the servers answer. One that answers already is used as it is, and not ended.

    Raises:
        ConfigError: a command that does not exist.
        RunError: a server ended, or did not answer in two minutes.
    """
    started: list[ToolServer] = []
    try:
        for name, entry in servers.items():
            if _answers(entry["url"]):
                line = f"{_SETTING}.{name}: {entry['url']} answers already; nothing is started"
                print(f"skyrl-spec: {line}", file=sys.stderr)
            else:
                started.append(_start(name, entry["command"], run_dir))
                _await(started[-1], entry["url"])
        yield started
    finally:
        for server in reversed(started):
            server.end()


def _start(name: str, command: str, run_dir: Path) -> ToolServer:
    log = run_dir / "servers" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = shlex.split(command)
    if words[0] == "python":
        # That of this run, whatever the shell's is.
        words[0] = sys.executable
    try:
        with log.open("ab") as file:
            # Out of this process's group, which a terminal and schedulers signal as a whole.
            process = subprocess.Popen(
                words,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
    except OSError as error:
        raise ConfigError(f"{_SETTING}.{name}.command={command}: {error.strerror}; change it") from None
    return ToolServer(name, process, log)


def _await(server: ToolServer, url: str) -> None:
    deadline = time.monotonic() + _START_S
    while not _answers(url):
        server.require_running()
        if time.monotonic() > deadline:
            raise RunError(f"{_SETTING}.{server.name}: {url} did not answer in {_START_S:.0f} s; see {server.log}")
        time.sleep(_LOOK_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S):
            return True
    except urllib.error.HTTPError:
        # It is there, whatever it says to this address.
        return True
    except (OSError, ValueError):
        return False
