"""``skyrl-spec compare``: the same run with the draft trained, trained at times, frozen or absent (``arms``).

The runs share settings, data and, seed by seed, all random choices, and differ only in the draft. They run one after
the other, each in its own folder of ``trainer.run_dir``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyrl_spec.controller.checkpoints import begin
from skyrl_spec.controller.folder_lock import locked
from skyrl_spec.controller.run import run_job, train
from skyrl_spec.controller.signals import SignalWatch
from skyrl_spec.evaluation.arms import FROZEN, Arm, arms
from skyrl_spec.evaluation.intervals import Interval, mean_interval, ratio_interval
from skyrl_spec.metrics import names
from skyrl_spec.metrics.headline import first_and_last, headline
from skyrl_spec.metrics.writers import read_jsonl
from skyrl_spec.planning.validation import validate
from skyrl_spec.report.command import write_report
from skyrl_spec.settings.compose import to_yaml
from skyrl_spec.settings.options import CompareOptions
from skyrl_spec.settings.schema import Config

# A file in the folder of a finished run, with its configuration as given.
_ASKED = "compared.yaml"
_SPEEDUP = "headline/rollout_speedup"

# Title, key and decimals.
_ROWS = (
    ("reward on held-out prompts", names.EVAL_SCORE, 3),
    ("reward in training", names.AVG_RAW_REWARD, 3),
    ("policy entropy", "policy/entropy", 3),
    ("acceptance length, training", names.acceptance_length("train"), 2),
    ("acceptance length, held-out", names.acceptance_length("eval"), 2),
    ("rollout tokens/s", names.THROUGHPUT, 0),
    ("rollout time, s", names.timing("generate"), 2),
    ("draft training, s", names.timing("draft_train"), 2),
    ("step time, s", names.STEP_TIME, 2),
)
# Rows whose ratios between arms are shown.
_RATIOS = (names.acceptance_length("train"), names.THROUGHPUT, names.STEP_TIME)

# Records of every run: by arm, then by seed.
Records = Mapping[str, Mapping[int, list[dict[str, Any]]]]


def checked_arms(config: Config, options: CompareOptions) -> list[Arm]:
    """``arms``, after ``validate`` of each."""
    runs = arms(config, options)
    for run in runs:
        validate(run.config)
    return runs


def run_comparison(config: Config, options: CompareOptions, *, verbose: bool = False) -> int:
    """Runs all arms, then prints the tables and writes ``compare.json`` and the report. Returns the exit code."""
    runs = checked_arms(config, options)

    def job(config: Config, verbose: bool, watch: SignalWatch) -> None:
        with locked(Path(config.trainer.run_dir)):
            _compare(config, runs, verbose, watch)

    return run_job(job, config, verbose=verbose)


def _compare(config: Config, runs: Sequence[Arm], verbose: bool, watch: SignalWatch) -> None:
    root = Path(config.trainer.run_dir)
    done = {run.folder for run in runs if is_done(run.config)}
    if config.trainer.resume_mode is None:
        # Files of an earlier comparison must not be taken for those of this one.
        for run in runs:
            (root / run.folder / _ASKED).unlink(missing_ok=True)
            begin(run.config, None)
    for number, run in enumerate(runs, start=1):
        seed = f", seed {run.seed}" if "/" in run.folder else ""
        print(f"\n== {number} of {len(runs)}: draft {run.name}{seed} ==", flush=True)
        if run.folder in done:
            print(f"already finished: {run.config.trainer.run_dir}")
            continue
        train(run.config, verbose, watch)
        (root / run.folder / _ASKED).write_text(asked(run.config))
    _tell(root, runs)


def _tell(root: Path, runs: Sequence[Arm]) -> None:
    """Prints the tables of finished runs, and writes their files."""
    records: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for run in runs:
        records.setdefault(run.name, {})[run.seed] = read_jsonl(root / run.folder / "metrics.jsonl")
    result = {
        run.folder: compared(records[run.name][run.seed]) | json.loads((root / run.folder / "summary.json").read_text())
        for run in runs
    }
    (root / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    speedups = {name: [result[run.folder].get(_SPEEDUP) for run in runs if run.name == name] for name in records}
    # More lines than one seed's cannot be told apart in a chart.
    page = write_report([root / run.folder for run in runs if run.seed == runs[0].seed], root / "report")
    lines = table(records) if len(runs) == len(records) else [*interval_table(records), "", *ratio_table(records)]
    print("\n" + "\n".join([*lines, speedup_line(speedups)]))
    print(f"\n  written to {root / 'compare.json'}\n  charts in  {page}")


def compared(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Headline values of a run, and the means over the second half of its steps, which vary less."""
    values: dict[str, Any] = dict(headline(records))
    for _, key, _ in _ROWS:
        if (mean := _late_mean(records, key)) is not None:
            values[f"late_mean/{key}"] = mean
    return values


def table(records: Records) -> list[str]:
    """One seed: first value, last value and ``late``, the mean of the second half. "-" for a missing value."""
    lines = [
        f"{'':<28}" + "".join(f"{f'draft {name}':>24}" for name in records),
        f"{'':<28}" + f"{'first':>8}{'last':>8}{'late':>8}" * len(records),
    ]
    for title, key, decimals in _ROWS:
        cells = []
        for by_seed in records.values():
            (own,) = by_seed.values()
            pair, late = first_and_last(own, key), _late_mean(own, key)
            numbers = (None, None, None) if pair is None else (*pair, late)
            shown = ("-" if number is None else f"{number:.{decimals}f}" for number in numbers)
            cells.append("".join(f"{text:>8}" for text in shown))
        lines.append(f"{title:<28}" + "".join(cells))
    return lines


def interval_table(records: Records) -> list[str]:
    """Several seeds: means of the second half, with 95 % confidence intervals. "-" for a missing value."""
    num_seeds = len(next(iter(records.values())))
    lines = [
        f"second half of the steps: mean of {num_seeds} seeds, 95 % confidence interval",
        f"{'':<28}" + "".join(f"{f'draft {name}':>24}" for name in records),
    ]
    for title, key, decimals in _ROWS:
        cells = []
        for by_seed in records.values():
            means = _late_means(by_seed, key)
            cells.append("-" if means is None else _mean_text(mean_interval(means), decimals))
        lines.append(f"{title:<28}" + "".join(f"{cell:>24}" for cell in cells))
    return lines


def ratio_table(records: Records) -> list[str]:
    """Several seeds: ratios to the frozen arm, or to the last one, of runs with the same seed."""
    base = FROZEN if FROZEN in records else list(records)[-1]
    others = [name for name in records if name != base]
    lines = [
        f"ratio to draft {base}, and its 95 % confidence interval",
        f"{'':<28}" + "".join(f"{f'draft {name}':>24}" for name in others),
    ]
    for title, key in ((title, key) for title, key, _ in _ROWS if key in _RATIOS):
        cells, base_means = [], _late_means(records[base], key)
        for name in others:
            means = _late_means(records[name], key)
            cells.append(_ratio_text(ratio_interval(means, base_means)) if means and base_means else "-")
        lines.append(f"{title:<28}" + "".join(f"{cell:>24}" for cell in cells))
    return lines


def speedup_line(speedups: Mapping[str, Sequence[float | None]]) -> str:
    """Rollout speed-up, measured at the end of each run that has a draft: the mean over its seeds."""
    cells = []
    for own in speedups.values():
        known = [speedup for speedup in own if speedup is not None]
        cells.append(f"{sum(known) / len(known):.2f}x" if known else "-")
    return f"{'rollout speed-up, at the end':<28}" + "".join(f"{text:>24}" for text in cells)


def is_done(config: Config) -> bool:
    """Whether a resumed comparison finds this run finished, with the same settings."""
    file = Path(config.trainer.run_dir) / _ASKED
    return config.trainer.resume_mode == "latest" and file.is_file() and file.read_text() == asked(config)


def asked(config: Config) -> str:
    """The settings of a run as YAML, equal for a run and its resumption. A finished run keeps them in a file."""
    return to_yaml(replace(config, trainer=replace(config.trainer, resume_mode=None)))


def _mean_text(interval: Interval, decimals: int) -> str:
    half = interval.high - interval.mean
    return f"{interval.mean:.{decimals}f}" + ("" if math.isnan(half) else f" ±{half:.{decimals}f}")


def _ratio_text(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _late_means(by_seed: Mapping[int, list[dict[str, Any]]], key: str) -> list[float] | None:
    """``_late_mean`` of every seed, in their order. None if one has none."""
    means = [_late_mean(records, key) for records in by_seed.values()]
    known = [mean for mean in means if mean is not None]
    return known if len(known) == len(means) else None


def _late_mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [value for record in records if (value := record.get(key)) is not None]
    late = values[len(values) // 2 :]
    return sum(late) / len(late) if late else None
