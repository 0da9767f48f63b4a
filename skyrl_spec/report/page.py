"""The HTML page of a report. It contains no script and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib import rc_context
from matplotlib.figure import Figure

from skyrl_spec.metrics import names
from skyrl_spec.metrics.headline import HEADLINES, first_and_last
from skyrl_spec.report.charts import STYLE, Chart
from skyrl_spec.report.read import RunData

_NUM_PLAIN_SAMPLES = 4
_SHOWN_CHARACTERS = 1200


def render(runs: Sequence[RunData], charts: Sequence[Chart]) -> str:
    """The page as HTML."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    pictures = [{"source": _svg_uri(c.figure), "title": c.title, "text": c.text, "caption": c.caption} for c in charts]
    return environment.get_template("page.html.j2").render(
        title=", ".join(run.label for run in runs),
        version=version("skyrl-spec"),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        columns=[*(entry.title for entry in HEADLINES), "speed-up", "steps", "s per step", "sync canary, worst"],
        rows=[(run.label, _row(run)) for run in runs],
        charts=pictures,
        drafted=[item for run in runs for item in _drafted_samples(run)],
        plain=[item for run in runs for item in _plain_samples(run, len(runs))],
        differences=_differences(runs),
    )


def png(chart: Chart) -> bytes:
    """The chart as PNG."""
    with rc_context(STYLE):
        buffer = io.BytesIO()
        chart.figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def _svg_uri(figure: Figure) -> str:
    with rc_context(STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _row(run: RunData) -> list[str]:
    cells = []
    for entry in HEADLINES:
        pair = first_and_last(run.records, entry.key)
        cells.append("–" if pair is None else " → ".join(f"{value:.{entry.decimals}f}" for value in pair))
    speedup = run.summary.get("headline/rollout_speedup")
    step_times, differences = run.series(names.STEP_TIME)[1], run.series(names.CANARY_POLICY)[1]
    return [
        *cells,
        "–" if speedup is None else f"{speedup:.2f}x",
        str(max(record[names.STEP] for record in run.records)),
        f"{sum(step_times) / len(step_times):.1f}" if step_times else "–",
        f"{max(differences):.1e}" if differences else "–",
    ]


def _drafted_samples(run: RunData) -> list[dict[str, Any]]:
    """Samples with known drafted tokens, of the first and the last evaluation that has them, for comparison."""
    drafted = [sample for sample in run.samples if sample.get("pieces")]
    steps = sorted({sample["step"] for sample in drafted})
    return [
        sample | {"label": run.label, "num_accepted": sum(accepted for _, accepted in sample["pieces"])}
        for sample in drafted
        if sample["step"] in (steps[0], steps[-1])
    ]


def _plain_samples(run: RunData, num_runs: int) -> list[dict[str, Any]]:
    plain = [sample for sample in run.samples if not sample.get("pieces")]
    chosen = plain[-max(1, _NUM_PLAIN_SAMPLES // num_runs) :]
    return [
        sample
        | {
            "label": run.label,
            "turns": [_cut(text) for text in sample.get("turns", [sample["response"]])],
            "reward": sample.get("reward", "-"),
        }
        for sample in chosen
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} [...]"


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Settings whose values differ between the runs, without output directories."""
    if len(runs) < 2:
        return []
    settings = {name: None for run in runs for name in run.config}
    rows = [(name, [run.config.get(name) for run in runs]) for name in settings]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values) and "run_dir" not in name]
