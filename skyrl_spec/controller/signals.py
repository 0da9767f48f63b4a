"""SIGINT and SIGTERM during a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What the shell reports for a process that a signal ended.
SIGNAL_EXIT = 128
# Seconds that a run may take to end before a further signal ends it at once.
_PATIENCE_S = 10.0


class Interrupted(Exception):  # noqa: N818
    """SIGINT or SIGTERM."""


class SignalWatch:
    """SIGINT and SIGTERM raise ``Interrupted`` in the main thread, once, and are remembered.

    Remembered, because what an exception becomes inside a C extension's call (Ray's, here) is not ours to decide.
    Further signals (``make`` and ``timeout`` send two) do not disturb the way out, until it has taken too long.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # The checkpoint that SIGTERM left behind.
        self.saved: Path | None = None
        # An error left a shield: what was to be done in one piece was not.
        self.is_broken = False
        self._received_s = 0.0
        self._is_shielded = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """SIGTERM, which is to save, waits for the end of the context; SIGINT does not."""
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
        """The handlers, for the time of the context. It may be entered again inside, to put them back."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            # On the way out ours stay: Ray's own would raise in the middle of its shutdown.
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
def sigterm_kept_from_children() -> Iterator[None]:
    """Processes started in this context never receive SIGTERM, nor do theirs: they inherit the blocked signal mask.

    A scheduler sends SIGTERM to every process of a job. What the driver needs to save must outlive it. The driver
    itself gets a SIGTERM of that time when the context ends, with the handlers that it had before.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ended_by_signal(job: Callable[[SignalWatch], None]) -> int:
    """``job(watch)`` to its end, or until a signal makes it clean up and end; returns the process's exit code."""
    watch = SignalWatch()
    try:
        with watch.installed():
            job(watch)
        return 0
    except Exception:
        if watch.received is None:
            raise
        print(f"skyrl-spec: {signal.Signals(watch.received).name}: stopped", file=sys.stderr)
        return SIGNAL_EXIT + watch.received
