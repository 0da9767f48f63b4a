"""A save beside training: the tensors are copied to host memory, and a thread of each rank writes the copies.

    workers:  step 5 | copy | step 6 ...              | step 7
    threads:                | write step 5's copies | publish

The threads agree on the files in a process group of their own, so they never meet the collectives of the training. No
process is forked: a copy of a process with threads may hold a lock for ever. Once the files of all ranks are on disk,
rank 0's thread publishes the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from skyrl_spec.checkpoint.dist import Save, on_all_ranks
from skyrl_spec.checkpoint.pieces import SavedComponent
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.types import Component

# Seconds between looks at the threads of all ranks, for one that waits for them.
_LOOK_INTERVAL_S = 0.2


class BackgroundSaver:
    """Writes one checkpoint at a time. All methods are collective, and for the thread that trains."""

    def __init__(self, timeout_s: float):
        """``timeout_s``: longest time for one rank to wait for the others' files."""
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = None
        self._writing: _Writing | None = None

    def begin(
        self,
        directory: Path,
        components: Mapping[Component, SavedComponent],
        extra: dict[str, Any],
        per_rank: dict[str, Tensor] | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        """Copies what is saved, and begins to write it. For the arguments and errors see ``dist.save``."""
        assert self._writing is None
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        save = Save(directory, components, extra, per_rank, parallel, copies=True)
        self._writing = _Writing(save, self._group)
        self._writing.start()

    def finish(self, *, wait: bool) -> bool:
        """Whether all ranks have written. ``wait``: waits until they have.

        Raises:
            RunError: it could not be written. Raised on all ranks; earlier checkpoints are untouched.
        """
        writing = self._writing
        if writing is None:
            return True
        while not _is_over(on_all_ranks(writing.state)):
            if not wait:
                return False
            writing.join(_LOOK_INTERVAL_S)
        self._writing = None
        writing.save.end(writing.error)
        return True


class _Writing(threading.Thread):
    """The thread of a save."""

    def __init__(self, save: Save, group: Any):
        super().__init__(daemon=True, name="checkpoint")
        self.save, self._group = save, group
        self.error: BaseException | None = None

    @property
    def state(self) -> str:
        """``writing``, ``ended`` or ``broken``: it raised an error of which the other ranks' threads do not hear."""
        if self.error is not None and not isinstance(self.error, OSError | CheckpointException):
            return "broken"
        return "writing" if self.is_alive() else "ended"

    def run(self) -> None:
        try:
            self.save.write(self._group)
        except BaseException as error:
            self.error = error


def _is_over(states: Sequence[str]) -> bool:
    """Whether all threads have ended, or one is broken, for which the others would wait."""
    return "broken" in states or "writing" not in states
