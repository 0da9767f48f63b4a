"""Environments in a separate process: one that raises, hangs or dies costs one response, not the run."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from skyrl_spec.envs.episodes import EnvResult, Episodes, Turn, failed
from skyrl_spec.envs.registry import register_custom
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.settings.schema import EnvironmentConfig

_PR_SET_PDEATHSIG = 1
# Longest time for the process to import its modules.
_START_S = 120.0


class Grader:
    """Plays turns one after the other, in the main thread of a separate process.

    The main thread, because reward functions often limit their time with a signal, which Python delivers only there.
    """

    def __init__(self, environment: EnvironmentConfig):
        self._environment = environment
        self._start()

    def play_all(self, turns: Sequence[Turn], earlier: Sequence[str] = (), num: int | None = None) -> list[EnvResult]:
        """Results in order. A turn that could not be played has an ``error``. Other episodes than these are over.

        Args:
            earlier: errors of the same batch of responses in earlier turns.
            num: number of responses of the batch. None: that of the turns.

        Raises:
            ConfigError: the environment cannot be used at all (``Episodes.play``).
            RunError: more than ``environment.max_failed_share`` of the batch could not be played.
        """
        results: list[EnvResult] = []
        process = self._connection
        while len(results) < len(turns):
            results += self._play(turns[len(results) :])
            errors = [*earlier, *(result.error for result in results if result.error is not None)]
            # Not only at the end, because every response that hangs costs timeout_s.
            self._require_few(errors, len(turns) if num is None else num)
        # A process that died had environments that it played before, which play their turns again next time.
        self._must_repeat = self._connection is not process
        return results

    def end_episodes(self) -> None:
        """Closes all environments."""
        with suppress(ConnectionError):
            self._connection.send([])

    def close(self) -> None:
        """Ends the process. May be called more than once."""
        self._finalizer()

    def _require_few(self, errors: Sequence[str], num_responses: int) -> None:
        allowed = self._environment.max_failed_share
        if len(errors) > allowed * num_responses:
            raise RunError(
                f"environment.max_failed_share={allowed:g}: {len(errors)} of {num_responses} responses could not be "
                f"scored, the last one in {errors[-1]}; fix the environment or the rows, or raise the setting"
            )

    def _play(self, turns: Sequence[Turn]) -> list[EnvResult]:
        """Results up to the first turn that the process hangs or dies on; that one's result says so."""
        results: list[EnvResult] = []
        problem = "the process that scored it died"
        self._wait_for_start()
        try:
            self._connection.send(turns)
            for turn in turns:
                num_played = len(turn.texts) if self._must_repeat else 1
                if not self._connection.poll(num_played * self._environment.timeout_s):
                    problem = f"took longer than environment.timeout_s={self._environment.timeout_s:g}"
                    break
                answer = self._connection.recv()
                if isinstance(answer, ConfigError):
                    raise answer
                results.append(answer)
        except (EOFError, ConnectionError):
            pass
        if len(results) < len(turns):
            self.close()
            self._start()
            results.append(failed(turns[len(results)], problem))
        return results

    def _start(self) -> None:
        # Not forked: the child would inherit locks that threads of Ray hold.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon, because daemons may not have child processes, and environments may need some.
        process = context.Process(target=_serve, args=(theirs, self._environment), daemon=False)
        process.start()
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, process, self._connection)
        self._has_started = False
        # Environments of earlier turns are lost, and play these turns again.
        self._must_repeat = True

    def _wait_for_start(self) -> None:
        """Waits until the process has imported its modules, so that no response pays for it.

        Raises:
            ConfigError: the process died, or took too long.
        """
        if self._has_started:
            return
        with suppress(EOFError):
            self._has_started = self._connection.poll(_START_S) and self._connection.recv()
        if not self._has_started:
            raise ConfigError("environment.custom: cannot be imported in the scoring process; correct PYTHONPATH")


def _end(process: BaseProcess, connection: Connection) -> None:
    process.kill()
    # The group includes processes that environments started. A process that has just started may have no group yet.
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    connection.close()


def _serve(connection: Connection, environment: EnvironmentConfig) -> None:
    """Main function of the process: receives batches of turns, and sends a result for each."""
    os.setsid()
    _ignore_signals()
    _end_with_parent()
    register_custom(environment.custom)
    connection.send(True)
    episodes = Episodes()
    while True:
        turns = connection.recv()
        episodes.keep_only({turn.episode for turn in turns})
        for turn in turns:
            connection.send(_result(episodes, turn, environment))


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


def _end_with_parent() -> None:
    """Makes this process end with its parent, even if the parent is killed or a reward function blocks all threads."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_parents_end, daemon=True).start()


def _wait_for_parents_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(os.getpid(), signal.SIGKILL)
