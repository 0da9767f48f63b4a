"""The run that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import ASKED, WHOLE, finish


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, Any]]]:
    """A complete run with every optional feature: its folder, terminal output and metrics."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, *finish(run_dir, *WHOLE, *ASKED, WANDB_MODE="offline")
