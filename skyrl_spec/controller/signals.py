"""Handling of SIGINT and SIGTERM during a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A shell reports this plus the signal's number for a process that a signal ended.
SIGNAL_EXIT = 128
# Seconds that a run may take to end before a further signal ends it at once.
_PATIENCE_S = 10.0


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM was received.

    A KeyboardInterrupt, because Ray ends a call that waits for an actor for no other exception.
    """


class SignalWatch:
    """Raises ``Interrupted`` in the main thread on the first SIGINT or SIGTERM, and keeps its number in ``received``.

    Read ``received`` rather than the exception: Ray's C extension may turn the exception into another one. Further
    signals (``make`` and ``timeout`` send two) are ignored, until the run has taken too long to end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # The checkpoint that was saved on SIGTERM.
        self.saved: Path | None = None
        # An error ended a shield: the work inside is incomplete.
        self.is_broken = False
        self._received_s = 0.0
        self._is_shielded = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Delays SIGTERM to the end of the context, so that the work inside can be saved. SIGINT is not delayed."""
        self._is_shielded, self.is_broken = True, False
        try:
            yield
        except BaseException:
            self.is_broken = True
            raise
        finally:
            self._is_shielded = False
        if self.received is not None:
            raise Interrupted

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Installs the handlers for the time of the context. Enter it again inside if another library replaced them."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            # After a signal our handlers stay. Ray's would raise in the middle of its shutdown.
            if self.received is None:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received is None:
            self.received, self._received_s = signum, time.monotonic()
            if signum == signal.SIGINT or not self._is_shielded:
                raise Interrupted
        if time.monotonic() - self._received_s > _PATIENCE_S:
            os._exit(SIGNAL_EXIT + signum)


@contextmanager
def signals_kept_from_children() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM for processes that are started in this context, and for their descendants.

    They inherit the signal mask. A scheduler sends SIGTERM to every process of a job, and the driver needs them to
    save.
    If the driver gets a signal inside the context, it handles it at the end, with the handlers it had before.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set(handlers))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ended_by_signal(job: Callable[[SignalWatch], int | None]) -> int:
    """Runs ``job(watch)`` until it ends or a signal stops it; returns the process's exit code, 0 for None."""
    watch = SignalWatch()
    try:
        with watch.installed():
            return job(watch) or 0
    except (Exception, KeyboardInterrupt):
        if watch.received is None:
            raise
        print(f"skyrl-spec: {signal.Signals(watch.received).name}: stopped", file=sys.stderr)
        return SIGNAL_EXIT + watch.received
