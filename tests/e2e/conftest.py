"""The run that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import ASKED, WHOLE, finish


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, Any]]]:
    """A run from its beginning to its end, with everything that can be asked of it: folder, terminal, metrics."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, *finish(run_dir, *WHOLE, *ASKED, WANDB_MODE="offline")
