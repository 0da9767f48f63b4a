"""``skyrl-spec`` with workers that fail in their own processes, as ``FAULTS`` (a file) says, one fault a line.

Each line is ``CALL FAULT``: in that call of ``train_mini_batch`` of a worker (from 1), it raises or hangs. A fault
happens once: a worker that starts afterwards takes the next line.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import ray

from skyrl_spec.cli import main
from skyrl_spec.controller import placement
from skyrl_spec.training.worker import PolicyWorker

FAULTS = "SKYRL_SPEC_TEST_FAULTS"
ACTOR_CLASS: Any = PolicyWorker
BASE: Any = ACTOR_CLASS.__ray_metadata__.modified_class


class FaultyWorker(BASE):
    """A worker that trains, until its call has come."""

    num_calls = 0

    def train_mini_batch(self, *args: Any) -> Any:
        import torch

        self.num_calls += 1
        path = Path(os.environ[FAULTS])
        faults = path.read_text().splitlines()
        if faults and faults[0].split()[0] == str(self.num_calls):
            path.write_text("".join(f"{line}\n" for line in faults[1:]))
            if faults[0].split()[1] == "hang":
                time.sleep(3600)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB.")
        return super().train_mini_batch(*args)


if __name__ == "__main__":
    placement.PolicyWorker = ray.remote(FaultyWorker)
    sys.exit(main(sys.argv[1:]))
