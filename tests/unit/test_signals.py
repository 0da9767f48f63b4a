"""Signals during a run: when they stop it, and which processes receive them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from skyrl_spec.controller.signals import Interrupted, SignalWatch, signals_kept_from_children


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restores pytest's handlers: a watch that has received a signal keeps its own."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def act(watch: SignalWatch, signum: int, *, shielded: bool, error: Exception | None = None) -> list[str]:
    """Sends itself a signal in the middle of some work; returns the part of the work that was done."""
    done = []
    with watch.shield() if shielded else nullcontext():
        try:
            os.kill(os.getpid(), signum)
            done.append("all of it")
        except Interrupted:
            return done
        if error is not None:
            raise error
    return done


def test_sigterm_waits_for_the_end_of_a_shield() -> None:
    watch = SignalWatch()
    with watch.installed():
        with pytest.raises(Interrupted):
            act(watch, signal.SIGTERM, shielded=True)
        # A further signal does not interrupt the shutdown.
        assert act(watch, signal.SIGTERM, shielded=False) == ["all of it"]
    assert watch.received == signal.SIGTERM
    assert not watch.is_broken


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_breaks_off_at_once(signum: int) -> None:
    watch = SignalWatch()
    with watch.installed():
        assert act(watch, signum, shielded=False) == []


def test_sigint_does_not_wait() -> None:
    watch = SignalWatch()
    with watch.installed(), pytest.raises(Interrupted), watch.shield():
        os.kill(os.getpid(), signal.SIGINT)
    assert watch.received == signal.SIGINT


def test_an_error_in_a_shield_stays_what_it_is() -> None:
    watch = SignalWatch()
    with watch.installed(), pytest.raises(ValueError, match="of its own"):
        act(watch, signal.SIGTERM, shielded=True, error=ValueError("of its own"))
    # The work is incomplete, so there is nothing to save.
    assert watch.is_broken


def test_a_child_never_gets_the_sigterm_that_its_parent_gets() -> None:
    """In a process without other threads: the workers of this test run have some, which may take the signal."""
    code = "import test_signals; test_signals.check_that_a_child_never_gets_the_sigterm()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=120)


def check_that_a_child_never_gets_the_sigterm() -> None:
    """The child has a handler that would end it. The parent's SIGTERM waits, and meets the parent's own handler."""
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); print(flush=True); input()"
    children, watch = [], SignalWatch()

    def start_child() -> None:
        with signals_kept_from_children():
            child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            children.append(child)
            assert child.stdout is not None
            child.stdout.readline()
            # Ray installs a handler when it starts.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            os.kill(os.getpid(), signal.SIGTERM)
            assert watch.received is None

    with watch.installed():
        with pytest.raises(Interrupted):
            start_child()
        (child,) = children
        child.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=2)
        child.communicate(b"\n")
    assert child.returncode == 0
    assert watch.received == signal.SIGTERM
