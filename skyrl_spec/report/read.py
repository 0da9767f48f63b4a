"""Files of runs, finished or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.metrics.writers import read_jsonl

_SAMPLE = {"step", "prompt", "response"}


@dataclass(frozen=True)
class RunData:
    """Contents of a run's directory.

    ``label`` is unique in a report. ``config`` has dotted names. ``summary`` is empty until the run ends.
    """

    label: str
    directory: Path
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, float]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps that have a value of ``key``, and the values."""
        points = [(record[names.STEP], record[key]) for record in self.records if record.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def numbered(self, prefix: str) -> list[str]:
        """The keys ``prefix`` + 1, 2, ... that the run has, in order."""
        keys = {key for record in self.records for key in record if key.startswith(prefix)}
        return sorted(keys, key=lambda key: int(key.removeprefix(prefix)))


def read_runs(directories: Sequence[Path]) -> list[RunData]:
    """The runs in ``directories``.

    Raises:
        ConfigError: a run is named twice, is not a run, cannot be read, or has no step yet.
    """
    resolved = [directory.resolve() for directory in directories]
    for directory, path in zip(directories, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ConfigError(f"report {directory}: is named twice; name each run once")
    labels = _labels(resolved)
    return [_read(directory, label) for directory, label in zip(directories, labels, strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as make the labels unique."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read(directory: Path, label: str) -> RunData:
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"report {directory}: has no metrics.jsonl; give the directory of a run (trainer.run_dir)")
    try:
        records = read_jsonl(metrics)
        samples = read_jsonl(directory / "samples.jsonl") if (directory / "samples.jsonl").is_file() else []
        summary_file, config_file = directory / "summary.json", directory / "config.yaml"
        summary = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
        config = (yaml.safe_load(config_file.read_text()) if config_file.is_file() else None) or {}
        _check_shapes(records, samples, summary, config)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"report {directory}: cannot be read ({reason}); copy the run's files again") from None
    if not records:
        raise ConfigError(f"report {directory}: metrics.jsonl has no step yet; wait for the first")
    return RunData(label, directory, records, samples, dict(_flat(config)), summary)


def _check_shapes(records: list[Any], samples: list[Any], summary: Any, config: Any) -> None:
    """Raises ``ValueError`` for files of these names that another program wrote."""
    if not all(isinstance(record, dict) and isinstance(record.get(names.STEP), int) for record in records):
        raise ValueError(f"metrics.jsonl has lines without {names.STEP}")
    if not all(isinstance(sample, dict) and sample.keys() >= _SAMPLE for sample in samples):
        raise ValueError(f"samples.jsonl has lines without {', '.join(sorted(_SAMPLE))}")
    if not isinstance(summary, dict) or not isinstance(config, dict):
        raise ValueError("summary.json or config.yaml must hold a mapping")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        # Free-form dictionaries have no settings of their own.
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
