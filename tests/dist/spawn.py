"""Runs a test's function on real gloo processes."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(fn: Callable[..., None], world_size: int, *args: Any, timeout_s: float = 120.0) -> None:
    """Runs ``fn(rank, *args)`` on ``world_size`` new processes that form one gloo group.

    The processes are forked as tests/conftest.py says. ``fn`` is pickled by name, so it must be a function of a module.

    Raises:
        RuntimeError: a child failed. The message is the traceback of the child that failed first; the others usually
            fail later, because they lose the connection.
        TimeoutError: not done after ``timeout_s``. The processes are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _child,
            args=(fn, world_size, Path(folder), timeout_s, args),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=0.2):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{fn.__name__} on {world_size} processes was not done after {timeout_s:.0f} s")
        except mp.ProcessRaisedException:
            raise RuntimeError(min(Path(folder).glob("*.error")).read_text()) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _child(
    rank: int, fn: Callable[..., None], world_size: int, folder: Path, timeout_s: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        fn(rank, *args)
        dist.destroy_process_group()
    except Exception:
        # Named by the time of day, so that the first failure sorts first; written before the peers can notice it.
        (folder / f"{time.time_ns()}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
