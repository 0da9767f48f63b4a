"""A part of ``test_dist_checkpoint`` that takes seconds, for mutants of checkpoints: resume under one layout each."""

from __future__ import annotations

from pathlib import Path

import pytest
from spawn import run_distributed
from test_dist_checkpoint import _background_job, _resume_job, model

__all__ = ["model"]


@pytest.mark.parametrize(("layout", "num_ranks"), [("tp1", 1), ("dp2-distributed", 2), ("tp2", 2)])
def test_resume_is_bitwise(model: Path, tmp_path: Path, layout: str, num_ranks: int) -> None:
    run_distributed(_resume_job, num_ranks, model, tmp_path, [layout])


def test_a_save_beside_training_holds_what_was_there_when_it_began(model: Path, tmp_path: Path) -> None:
    run_distributed(_background_job, 2, model, tmp_path, ["tp2"])
