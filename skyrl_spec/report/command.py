"""The command ``skyrl-spec report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skyrl_spec.errors import ConfigError
from skyrl_spec.report import charts, page
from skyrl_spec.report.read import read_runs


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes ``index.html`` and the charts as PNG files to ``out``. Returns the path of the page.

    ``out=None``: the folder ``report`` in the first run's directory.

    Raises:
        ConfigError: a run cannot be read, or ``out`` cannot be written to.
    """
    runs = read_runs(run_dirs)
    drawn = charts.draw(runs)
    out = out or run_dirs[0] / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Charts of an earlier report.
        for path in out.glob("*.png"):
            path.unlink()
        for chart in drawn:
            (out / f"{chart.name}.png").write_bytes(page.png(chart))
        target = out / "index.html"
        target.write_text(page.render(runs, drawn), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written to ({error.strerror}); choose another directory") from None
    return target
