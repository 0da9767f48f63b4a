"""Output of a run on the console: a start-up panel, one line per step, and a summary. Plain text without a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from skyrl_spec.metrics import names
from skyrl_spec.metrics.headline import HEADLINES, first_and_last
from skyrl_spec.metrics.writers import Writer

LINE_WIDTH = 100
LINES_PER_HEADER = 20
# Stands for the column with the number of drafted tokens, which is made of several metrics.
_LENGTHS = "lengths"

# Title, width, key and decimals of the columns between the step and the remaining time.
_COLUMNS = (
    ("reward", 8, names.AVG_RAW_REWARD, 3),
    ("accept", 8, names.acceptance_length("train"), 2),
    ("predicted", 10, names.PREDICTED_ACCEPTANCE_LENGTH, 2),
    ("k", 6, _LENGTHS, 0),
    ("gain", 6, names.ESTIMATED_SPEEDUP, 1),
    ("tok/s", 8, names.THROUGHPUT, 0),
    ("gen s", 7, names.timing("generate"), 1),
    ("policy", 7, names.timing("policy_train"), 1),
    ("draft", 7, names.timing("draft_train"), 1),
    ("sync", 6, names.timing("sync_weights"), 1),
    ("step s", 7, names.STEP_TIME, 1),
)


class ConsoleWriter(Writer):
    """Prints one line per step, of at most 100 columns, under a heading, and one line per evaluation.

    On a terminal a progress bar stays below the lines until ``close``.
    """

    def __init__(self, num_steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._num_steps = num_steps
        self._num_lines = 0
        self._first_step: int | None = None
        self._started_s = time.monotonic()
        self._progress: Progress | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        """Prints the facts of the run, one per line, and starts the progress bar."""
        self.panel(facts)
        if self.console.is_terminal:
            self._progress = _progress(self.console)
            self._progress.start()
            self._progress.add_task("steps", total=self._num_steps)

    def panel(self, facts: Mapping[str, Any]) -> None:
        """Prints facts, one per line, in a panel on a terminal."""
        width = max(map(len, facts), default=0)
        lines = "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
        if self.console.is_terminal:
            self.console.print(Panel.fit(lines, title="skyrl_spec", border_style="cyan"), highlight=False, markup=False)
        else:
            self._print(lines)

    def note(self, text: str) -> None:
        """Prints a line of text."""
        self._print(text, style="dim")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if names.AVG_RAW_REWARD in values:
            if self._first_step is None:
                # The remaining time is estimated without start-up and the evaluation before the first step.
                self._first_step = step
                self._started_s = time.monotonic() - values.get(names.STEP_TIME, 0.0)
            if self._num_lines % LINES_PER_HEADER == 0:
                self._print(header_line(), style="dim")
            self._num_lines += 1
            self._print(step_line(step, self._num_steps, values, self._seconds_left(step)))
        if names.EVAL_SCORE in values:
            self._print(eval_line(step, values), style="bold cyan")
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def close(self) -> None:
        """Removes the progress bar. Can be called repeatedly."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close_with(
        self,
        records: Sequence[Mapping[str, Any]],
        run_dir: Path,
        *,
        speedup: float | None = None,
        next_commands: Sequence[str] = (),
    ) -> None:
        """Prints the summary: first and last values of ``records``, the run's directory, and commands to run next.

        ``speedup``: rollout tokens/s with the draft / tokens/s without it. None: not measured.
        """
        self.close()
        self._print("")
        for line in summary_lines(records, speedup):
            self._print(line, style="bold")
        self._print(f"  run   {run_dir}")
        for index, command in enumerate(next_commands):
            self._print(f"  {'next' if index == 0 else '    '}  {command}")

    def _seconds_left(self, step: int) -> float:
        """Estimate of the remaining time from the mean time of the steps so far, evaluations included."""
        assert self._first_step is not None
        num_done = step - self._first_step + 1
        return (time.monotonic() - self._started_s) / num_done * (self._num_steps - step)

    def _print(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def header_line() -> str:
    """Titles of the columns of ``step_line``."""
    return f"{'step':>11}" + "".join(f"{title:>{width}}" for title, width, _, _ in _COLUMNS) + f"{'left':>9}"


def step_line(step: int, num_steps: int, values: Mapping[str, float], seconds_left: float) -> str:
    """Values of a step in columns. "-" for a missing value."""
    cells = (f"{_cell(values, key, decimals):>{width}}" for _, width, key, decimals in _COLUMNS)
    return f"{f'{step}/{num_steps}':>11}" + "".join(cells) + f"{_clock(seconds_left):>9}"


def _cell(values: Mapping[str, float], key: str, decimals: int) -> str:
    return _lengths(values) if key == _LENGTHS else _number(values.get(key), decimals)


def _lengths(values: Mapping[str, float]) -> str:
    """Drafted tokens, as "3", or "2→7" from the largest batch of a rollout to the smallest. "-" without a draft."""
    prefix = names.LENGTH_AT_BATCH
    by_batch = {int(key.removeprefix(prefix)): value for key, value in values.items() if key.startswith(prefix)}
    if by_batch:
        first, last = (round(by_batch[size]) for size in (max(by_batch), min(by_batch)))
        return f"{first}→{last}" if first != last else f"{first}"
    accepted, rate = values.get(names.acceptance_length("train")), values.get(names.acceptance_rate("train"))
    return "-" if accepted is None or not rate else f"{(accepted - 1) / rate:.0f}"


def eval_line(step: int, values: Mapping[str, float]) -> str:
    """Values of an evaluation in the columns of ``step_line``."""
    line = f"{'eval':>11}{_number(values[names.EVAL_SCORE], 3):>8}"
    length = values.get(names.acceptance_length("eval"))
    if length is not None:
        line += f"{_number(length, 2):>8}"
    return f"{line}  on held-out prompts, after step {step}"


def summary_lines(records: Sequence[Mapping[str, Any]], speedup: float | None = None) -> list[str]:
    """First value, last value and change of the headline metrics, then canaries and speed-up."""
    lines = [f"{f'{_last_step(records)} steps':<40}{'first':>9}{'last':>9}{'change':>9}"]
    for _, title, key, decimals in HEADLINES:
        if (pair := first_and_last(records, key)) is not None:
            first, last = (_number(value, decimals) for value in pair)
            change = f"{pair[1] - pair[0]:+.{decimals}f}"
            lines.append(f"  {title:<38}{first:>9}{last:>9}{change:>9}")
    lines += _canary_lines(records)
    if speedup is not None:
        lines.append(f"  {'rollout speed-up by the draft':<38}{'':>9}{f'{speedup:.2f}x':>9}")
    return lines


def _canary_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Number of checks, largest differences and cost of the sync canary and of the losslessness canary."""
    lines = []
    checked = [record for record in records if names.CANARY_POLICY in record]
    if checked:
        parts = [f"checked {len(checked)}x", f"policy differs by {_worst(checked, names.CANARY_POLICY)}"]
        # A check has no drafted tokens if all responses end at once.
        if drafted := [record for record in checked if names.CANARY_DRAFT in record]:
            parts.append(f"draft by {_worst(drafted, names.CANARY_DRAFT)}")
        lines.append(f"  sync canary: {', '.join(parts)} (log-probs); {_share(records, 'canary')} of the time")
    tested = [record for record in records if names.LOSSLESS_P_VALUE in record]
    if tested:
        equal = min(record[names.LOSSLESS_GREEDY] for record in tested)
        p_value = min(record[names.LOSSLESS_P_VALUE] for record in tested)
        lines.append(
            f"  lossless canary: checked {len(tested)}x, {equal:.0%} of greedy responses equal, smallest p "
            f"{p_value:.2g}; {_share(records, 'lossless')} of the time"
        )
    return lines


def _worst(records: Iterable[Mapping[str, Any]], key: str) -> str:
    # Values that are not finite are null in metrics.jsonl.
    values = [record[key] for record in records]
    return "NaN" if None in values else f"{max(values):.1e}"


def _share(records: Iterable[Mapping[str, Any]], phase: str) -> str:
    steps = [record for record in records if names.STEP_TIME in record]
    share = sum(r.get(names.timing(phase), 0.0) for r in steps) / sum(r[names.STEP_TIME] for r in steps)
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _last_step(records: Iterable[Mapping[str, Any]]) -> int:
    return max((record[names.STEP] for record in records), default=0)


def _number(value: float | None, decimals: int) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 100_000:
        return f"{value / 1000:.0f}k"
    return f"{value:.{0 if abs(value) >= 1000 else decimals}f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=2)
