"""Errors of actors, each as one line."""

from __future__ import annotations

import re

import ray

from skyrl_spec.errors import ActorError

# Ray colours its part of a traceback.
_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def actor_error(who: str, error: ray.exceptions.RayTaskError) -> ActorError:
    """The exception that an actor raised, as one line with its traceback attached."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    first_line = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    raised = ActorError(f"{who} raised {type(cause).__name__}: {first_line[:200]}".rstrip(": "))
    raised.traceback = _TERMINAL_COLOUR.sub("", str(error))
    return raised


def cause_of_death(error: BaseException) -> str:
    """Last line of an actor's error, without a traceback and without Ray's list of common causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.sub(r".*Worker exit detail: (.*?) Some common causes include.*", r"killed or crashed: \1", lines[-1])
    return line[:200]
