"""Errors that a user sees as one line. Each can be pickled, so that it crosses Ray unchanged."""

from __future__ import annotations

from pathlib import Path


class ConfigError(ValueError):
    """A mistake the user can fix. One line: setting, value, what is allowed, the fix. Exit code 2."""

    def __init__(self, line: object):
        # A value of the user's may have line breaks.
        super().__init__(" ".join(str(line).splitlines()))


class RunError(RuntimeError):
    """The end of a run whose configuration is right, such as no space for an actor. One line, exit code 1."""


class RestartableError(RunError):
    """A failure that a restart from a checkpoint can cure; ``trainer.max_restarts`` counts them.

    ``checkpoint`` is the newest checkpoint of the run, None if it has none.
    """

    checkpoint: Path | None = None


class ActorError(RestartableError):
    """An exception inside an engine or a worker; ``traceback`` is the one of the actor, for a log file."""

    traceback: str = ""


class LostActorError(RestartableError):
    """An engine or a worker died or did not answer in time, and could not be replaced."""


class SyncMismatchError(RestartableError):
    """After a sync, an engine does not hold the trainer's weights. The step is complete and saved."""
