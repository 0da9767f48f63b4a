"""kill -9 at random moments of a save. A resume always finds a complete checkpoint. ``make kills``."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed
from tiny_checkpoints import make_batch, make_config, write_checkpoint

from skyrl_spec.checkpoint import dist, folders, pieces
from skyrl_spec.checkpoint.background import BackgroundSaver
from skyrl_spec.checkpoint.optimizer_state import initialize_optimizer
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

NUM_KILLS = 20
KEEP = 2


def run(model: Path, root: Path, store: Path, said: Connection, *, beside: bool) -> None:
    """Resumes from the newest checkpoint, trains and saves until killed, and reports the resume and each save.

    ``beside``: a step is trained while the step before it is written.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    ranks = parallel.lay_out(1, torch.device("cpu"))
    trainer = PolicyTrainer(make_config(model), load_spec(str(model)), ranks, total_optimizer_steps=10_000)
    parts, step = trainer.saved_components(), 0
    newest = folders.latest(root)
    if newest is not None:
        extra = dist.load(newest, parts).extra
        step = extra["step"]
        # Everything in the checkpoint is of the same step.
        assert checksum(trainer) == extra["checksum"]
        assert newest.name == f"step_{step}"
    said.send(("resumed", step))
    step, saver = step + 1, BackgroundSaver(timeout_s=60.0)
    trainer.train_mini_batch(make_batch(step))
    while True:
        said.send(("saving", step))
        extra = {"step": step, "checksum": checksum(trainer)}
        if beside:
            saver.begin(root / f"step_{step}", parts, extra)
            trainer.train_mini_batch(make_batch(step + 1))
            saver.finish(wait=True)
        else:
            dist.save(root / f"step_{step}", parts, extra)
        folders.rotate(root, KEEP)
        said.send(("saved", step))
        step += 1
        if not beside:
            trainer.train_mini_batch(make_batch(step))


def checksum(trainer: PolicyTrainer) -> float:
    """Checksum of all trained tensors, including moments."""
    total = 0.0
    for part in trainer.saved_components().values():
        initialize_optimizer(part.trainable)
        for parameter in part.trainable.module.parameters():
            for _, flat, _, _ in pieces._tensors(part, parameter):
                total += float(flat.double().sum())
    return total


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("beside", [False, True], ids=["between_steps", "beside_training"])
def test_a_save_killed_at_a_random_moment_costs_that_save_alone(tmp_path: Path, beside: bool) -> None:
    model, root = write_checkpoint(tmp_path / "model"), tmp_path / "checkpoints"
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    saved, moments = 0, {"in a save": 0, "between": 0}
    for kill in range(NUM_KILLS + 1):
        heard, said = context.Pipe(duplex=False)
        process = context.Process(
            target=run, args=(model, root, tmp_path / f"store{kill}", said), kwargs={"beside": beside}
        )
        process.start()
        said.close()
        what, step = heard.recv()
        assert (what, step) == ("resumed", step)
        # The resume is at the last complete step, or at the step whose save was killed.
        assert step in (saved, saved + 1), (step, saved)
        saved = step
        if kill == NUM_KILLS:
            process.kill()
            process.join()
            break
        # Two saves of a process are not killed. So steps advance, and the second save gives the time that one takes.
        hear(heard, "saving")
        hear(heard, "saved")
        hear(heard, "saving")
        start = time.perf_counter()
        saved = hear(heard, "saved")
        moment_s = draw.uniform(0.0, time.perf_counter() - start)
        hear(heard, "saving")
        start = time.perf_counter()
        while time.perf_counter() - start < moment_s:
            pass
        process.kill()
        process.join()
        was_saved = has_more(heard)
        moments["between" if was_saved else "in a save"] += 1
        saved += was_saved
        found = folders.latest(root)
        assert found is not None
        assert found.name in (f"step_{saved}", f"step_{saved + 1}")
    kind = "beside training" if beside else "between steps"
    print(f"\n{NUM_KILLS} kills, saves {kind}: {moments}, {saved} steps were saved")
    assert moments["in a save"] >= NUM_KILLS / 2


def has_more(heard: Connection) -> bool:
    """Whether the process reported the save before it died."""
    try:
        return heard.recv()[0] == "saved"
    except EOFError:
        return False


def hear(heard: Connection, expected: str) -> int:
    what, step = heard.recv()
    assert what == expected
    return step
