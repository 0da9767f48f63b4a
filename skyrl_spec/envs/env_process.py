"""A process that plays turns in environments: one that raises, hangs or dies costs one response, not the run."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait

from skyrl_spec.envs.episodes import EnvResult, Episodes, Turn, failed
from skyrl_spec.envs.registry import register_custom
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.schema import EnvironmentConfig

_PR_SET_PDEATHSIG = 1
# Longest time for the process to import the modules of environments.
_START_S = 120.0
# A process that has been busy with a turn for so long waits rather than computes.
_LONG_S = 0.5


def start_server() -> None:
    """Starts the server that forks the processes, which ends with the thread that calls this.

    It does nothing else. A fork of the run's own process would inherit locks that threads of Ray hold.
    """
    forkserver.set_forkserver_preload(["skyrl_spec.envs.preloaded"])
    forkserver.ensure_running()


class EnvProcess:
    """Plays a turn at a time, in the main thread of a separate process.

    The main thread, because reward functions often limit their time with a signal, which Python delivers only there.
    Readable once there is an answer: ``multiprocessing.connection.wait`` takes it.
    """

    def __init__(self, environment: EnvironmentConfig):
        self._timeout_s = environment.timeout_s
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        # Not a daemon, because daemons may not have child processes, and environments may need some.
        self._process = context.Process(target=_serve, args=(theirs, environment, dict(os.environ)), daemon=False)
        self._process.start()
        theirs.close()
        self.is_ready = False
        self._began, self._limit_s = time.monotonic(), _START_S
        self._turn: Turn | None = None
        # Episodes whose environments go on here.
        self._episodes: set[int] = set()

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self._turn is None

    @property
    def deadline(self) -> float:
        """Time by which it must answer, of ``time.monotonic``. Infinite if it is idle."""
        return math.inf if self.is_idle else self._began + self._limit_s

    @property
    def long_from(self) -> float:
        """Time from which its turn is a long one. Infinite if it has none."""
        return math.inf if self._turn is None else self._began + _LONG_S

    @property
    def is_long(self) -> bool:
        return self.long_from <= time.monotonic()

    def has(self, turn: Turn) -> bool:
        """Whether the environment of this turn's episode goes on here."""
        return turn.episode in self._episodes

    def play(self, turn: Turn) -> None:
        """Begins ``turn``. The process must be idle."""
        # An environment that was lost plays its earlier turns again.
        num_played = 1 if self.has(turn) else len(turn.texts)
        self._turn, self._began, self._limit_s = turn, time.monotonic(), num_played * self._timeout_s
        with suppress(ConnectionError):
            self.connection.send(turn)

    def receive(self) -> EnvResult | ConfigError | None:
        """Takes in what the process said. None: it was that it is ready.

        Raises:
            EOFError: the process died.
        """
        try:
            answer = self.connection.recv()
        except ConnectionError as error:
            raise EOFError from error
        if self._turn is None:
            self.is_ready = True
            return None
        turn, self._turn = self._turn, None
        is_over = not isinstance(answer, EnvResult) or answer.error is not None or answer.is_done
        goes_on = not is_over and len(turn.texts) < turn.max_turns
        (self._episodes.add if goes_on else self._episodes.discard)(turn.episode)
        return answer

    def end_episodes(self, episodes: Collection[int]) -> None:
        """Closes the environments of these episodes."""
        if mine := self._episodes.intersection(episodes):
            self._episodes -= mine
            with suppress(ConnectionError):
                self.connection.send(sorted(mine))

    def failure(self, *, is_dead: bool) -> EnvResult | ConfigError:
        """Result of the turn that the process died on, or that took too long. ConfigError: it has not even begun."""
        if self._turn is None:
            return ConfigError("environment.custom: cannot be imported in the scoring process; correct PYTHONPATH")
        too_long = f"took longer than environment.timeout_s={self._timeout_s:g}"
        return failed(self._turn, "the process that scored it died" if is_dead else too_long)

    def end(self) -> None:
        """Ends the process and those that environments started."""
        self._process.kill()
        assert self._process.pid is not None
        # A process that has just started may have no group yet.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, environment: EnvironmentConfig, variables: dict[str, str]) -> None:
    """Main function of the process: receives turns and sends a result for each, or receives episodes that are over."""
    os.setsid()
    _ignore_signals()
    # The parent is the server, which ends with the run.
    end_with_parent()
    threading.Thread(target=_wait_for_the_end_of_the_run, daemon=True).start()
    # The server has those of its start.
    os.environ.update(variables)
    register_custom(environment.custom)
    connection.send(True)
    episodes = Episodes()
    while True:
        message: Turn | Sequence[int] = connection.recv()
        if isinstance(message, Turn):
            connection.send(_result(episodes, message, environment))
        else:
            episodes.end(message)


def _result(episodes: Episodes, turn: Turn, environment: EnvironmentConfig) -> EnvResult | ConfigError:
    try:
        return episodes.play(turn, environment.skyrl_gym.get(turn.prompt.env_class, {}))
    except ConfigError as error:
        return error
    except RuntimeError as error:
        return failed(turn, str(error))


def _ignore_signals() -> None:
    """Ignores SIGINT and SIGTERM, which schedulers send to all processes: the run decides when this process ends.

    Child processes of environments handle signals as usual.
    """

    def restore() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        # Not SIG_IGN, which child processes would keep after exec.
        signal.signal(signum, lambda *_: None)
    os.register_at_fork(after_in_child=restore)


def end_with_parent() -> None:
    """Makes this process end with its parent, even if a reward function blocks all threads. Only Linux can do this.

    The parent ends, for this purpose, with the thread that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_the_end_of_the_run() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(os.getpid(), signal.SIGKILL)
