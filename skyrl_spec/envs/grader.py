"""A pool of processes that play turns. Results come as turns end; one that hangs costs its process, not the queue.

An environment that goes on after a turn stays in its process, so a pool of whole tasks (``concurrent.futures``, pebble)
does not do: later turns must find it there.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from queue import SimpleQueue

from skyrl_spec.envs.env_process import EnvProcess, start_server
from skyrl_spec.envs.episodes import EnvResult, Turn
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.settings.schema import EnvironmentConfig


class Grader:
    """Plays turns in as many processes as there are cores, and in more where turns take long.

    ``environment.max_env_workers`` bounds their number. They start as they are needed.
    """

    def __init__(self, environment: EnvironmentConfig):
        self._environment = environment
        start_server()
        self._dispatcher = _Dispatcher(environment)
        threading.Thread(target=self._dispatcher.run, daemon=True, name="grader").start()
        self._finalizer = weakref.finalize(self, self._dispatcher.stop)

    def submit(self, turn: Turn) -> Future[EnvResult]:
        """Begins to play ``turn``. A turn that cannot be played has an ``error``.

        The future raises ConfigError if the environment cannot be used at all (``Episodes.play``).
        """
        task = _Task(turn)
        self._dispatcher.send(task)
        return task.future

    def play_all(self, turns: Sequence[Turn]) -> list[EnvResult]:
        """Plays turns; see ``results``."""
        return self.results([self.submit(turn) for turn in turns])

    def results(
        self, futures: Sequence[Future[EnvResult]], earlier: Sequence[str] = (), num: int | None = None
    ) -> list[EnvResult]:
        """Results of submitted turns, in order. A turn that could not be played has an ``error``.

        Args:
            earlier: errors of the same batch of responses in earlier turns.
            num: number of responses of the batch. None: that of the turns.

        Raises:
            ConfigError: the environment cannot be used at all.
            RunError: more than ``environment.max_failed_share`` of the batch could not be played.
        """
        errors = list(earlier)
        try:
            for future in as_completed(futures):
                if (error := future.result().error) is not None:
                    errors.append(error)
                    # Not only at the end, because every response that hangs costs timeout_s.
                    require_few(errors, len(futures) if num is None else num, self._environment)
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    def end_episodes(self, episodes: Collection[int]) -> None:
        """Closes the environments of these episodes."""
        self._dispatcher.send(frozenset(episodes))

    def close(self) -> None:
        """Ends the processes. May be called more than once."""
        self._finalizer()


def require_few(errors: Sequence[str], num_responses: int, environment: EnvironmentConfig) -> None:
    """Raises RunError if more than ``environment.max_failed_share`` of so many responses failed."""
    allowed = environment.max_failed_share
    if len(errors) > allowed * num_responses:
        raise RunError(
            f"environment.max_failed_share={allowed:g}: {len(errors)} of {num_responses} responses could not be "
            f"scored, the last one in {errors[-1]}; fix the environment or the rows, or raise the setting"
        )


@dataclass(frozen=True, eq=False)
class _Task:
    turn: Turn
    future: Future[EnvResult] = field(default_factory=Future)


@dataclass(eq=False)
class _Worker:
    """A process, the task that it plays, and those that wait for it because their environments are there."""

    process: EnvProcess
    task: _Task | None = None
    waiting: deque[_Task] = field(default_factory=deque)


class _Dispatcher:
    """Gives tasks to processes, in a thread of its own. Only ``send`` and ``stop`` are for other threads."""

    def __init__(self, environment: EnvironmentConfig):
        self._environment = environment
        self._num_cores = len(os.sched_getaffinity(0))
        self._requests: SimpleQueue[_Task | frozenset[int] | None] = SimpleQueue()
        self._woken, self._wake = Pipe(duplex=False)
        self._lock, self._is_closed = threading.Lock(), False
        # Why nothing is played any more.
        self._problem = "the run ends while responses are scored"
        self._has_ended = threading.Event()
        self._workers: list[_Worker] = []
        # Tasks that any process may play.
        self._waiting: deque[_Task] = deque()
        self._owner: dict[int, _Worker] = {}

    def send(self, request: _Task | frozenset[int] | None) -> None:
        """Takes a task or episodes that are over. Raises RunError once the pool has ended."""
        with self._lock:
            if self._is_closed:
                raise RunError(self._problem)
            self._requests.put(request)
        self._wake.send_bytes(b"")

    def stop(self) -> None:
        """Ends the processes and what waits for them. Returns once they have ended."""
        with suppress(RunError):
            self.send(None)
        self._has_ended.wait()

    def run(self) -> None:
        try:
            while self._take_requests():
                self._begin_tasks()
                self._start_workers()
                self._wait_for_answers()
        except OSError as error:
            self._problem = f"no process for environments can be started ({error}); free memory or processes"
        finally:
            self._end()

    def _wait_for_answers(self) -> None:
        connections = [worker.process.connection for worker in self._workers]
        ready = set(wait([self._woken, *connections], self._seconds_to_wait()))
        for worker in list(self._workers):
            if worker.process.connection in ready:
                self._receive(worker)
            elif worker.process.deadline <= time.monotonic():
                self._lose(worker, is_dead=False)

    def _end(self) -> None:
        """Ends the processes, and what waits for them in other threads."""
        with self._lock:
            self._is_closed = True
        while not self._requests.empty():
            request = self._requests.get()
            if isinstance(request, _Task):
                self._waiting.append(request)
        for worker in self._workers:
            worker.process.end()
            self._waiting.extend(worker.waiting)
            if worker.task is not None:
                worker.task.future.set_exception(RunError(self._problem))
        for task in self._waiting:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(RunError(self._problem))
        self._has_ended.set()

    def _take_requests(self) -> bool:
        """Takes in all requests. False: it is time to stop."""
        while self._woken.poll():
            self._woken.recv_bytes()
            request = self._requests.get()
            if request is None:
                return False
            if isinstance(request, _Task):
                owner = self._owner.get(request.turn.episode)
                (self._waiting if owner is None else owner.waiting).append(request)
            else:
                self._end_episodes(request)
        return True

    def _end_episodes(self, episodes: frozenset[int]) -> None:
        for worker in {self._owner.pop(episode) for episode in episodes & self._owner.keys()}:
            worker.process.end_episodes(episodes)

    def _begin_tasks(self) -> None:
        for worker in self._workers:
            while worker.process.is_idle and (tasks := worker.waiting or self._waiting):
                task = tasks.popleft()
                if task.future.set_running_or_notify_cancel():
                    worker.task = task
                    worker.process.play(task.turn)

    def _start_workers(self) -> None:
        """Starts processes for tasks that wait, as many as may begin beside those there are."""
        num_starting = sum(not worker.process.is_ready for worker in self._workers)
        num_long = sum(worker.process.is_long for worker in self._workers)
        allowed = min(self._environment.max_env_workers, self._num_cores + 2 * num_long)
        for _ in range(min(len(self._waiting) - num_starting, allowed - len(self._workers))):
            self._workers.append(_Worker(EnvProcess(self._environment)))

    def _seconds_to_wait(self) -> float | None:
        """Seconds until a process must have answered, or another may begin beside it. None: no such time."""
        moments = [worker.process.deadline for worker in self._workers]
        if self._waiting:
            moments += [worker.process.long_from for worker in self._workers if not worker.process.is_long]
        left_s = min(moments, default=math.inf) - time.monotonic()
        return None if left_s == math.inf else max(0.0, left_s)

    def _receive(self, worker: _Worker) -> None:
        try:
            answer = worker.process.receive()
        except EOFError:
            self._lose(worker, is_dead=True)
            return
        task, worker.task = worker.task, None
        if task is not None:
            assert answer is not None
            self._own(worker, task.turn)
            _finish(task, answer)

    def _own(self, worker: _Worker, turn: Turn) -> None:
        """Notes where the environment of this turn's episode is, if it goes on."""
        if worker.process.has(turn):
            self._owner[turn.episode] = worker
        else:
            self._owner.pop(turn.episode, None)

    def _lose(self, worker: _Worker, *, is_dead: bool) -> None:
        """Ends a process that died or took too long. Its environments play their turns again in another."""
        self._workers.remove(worker)
        self._owner = {episode: owner for episode, owner in self._owner.items() if owner is not worker}
        failed = [worker.task] if worker.task is not None else []
        if not any(one.process.is_ready for one in [worker, *self._workers]):
            # None has started, so none can.
            failed = [task for task in self._waiting if task.future.set_running_or_notify_cancel()]
            self._waiting.clear()
        for task in failed:
            _finish(task, worker.process.failure(is_dead=is_dead))
        self._waiting.extendleft(reversed(worker.waiting))
        worker.process.end()


def _finish(task: _Task, answer: EnvResult | ConfigError) -> None:
    if isinstance(answer, ConfigError):
        task.future.set_exception(answer)
    else:
        task.future.set_result(answer)
