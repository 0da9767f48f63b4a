"""The course of ``skyrl-spec report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skyrl_spec.errors import ConfigError
from skyrl_spec.report import charts, page
from skyrl_spec.report.read import read_runs


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """``index.html`` and the charts as PNG files in ``out`` (None: ``report`` in the first run's); returns the page.

    Raises:
        ConfigError: no such run, or it cannot be written.
    """
    runs = read_runs(run_dirs)
    drawn = charts.draw(runs)
    out = out or run_dirs[0] / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Of a former report here.
        for path in out.glob("*.png"):
            path.unlink()
        for chart in drawn:
            (out / f"{chart.name}.png").write_bytes(page.png(chart))
        target = out / "index.html"
        target.write_text(page.render(runs, drawn), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror}); choose another place") from None
    return target
