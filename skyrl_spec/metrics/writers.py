"""Writers of a run's files: metrics, samples and summary. ``dashboards`` has those for wandb and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skyrl_spec.metrics import names
from skyrl_spec.types import DraftedResponse, Generation, Prompt, Rollout

Sample = dict[str, Any]


class Writer:
    """Base class of writers. A subclass overrides the methods for what it writes."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of one step, evaluation included. Called once per step."""

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes a few rollouts of a step."""

    def summarize(self, headline: Mapping[str, float]) -> None:
        """Writes the headline values (``metrics.headline``). Called once, at the end of the run."""

    def close(self) -> None:
        """Closes files and connections. Can be called repeatedly."""


class JsonlFile:
    """A file with one JSON object per line. Each line is flushed when it is written.

    ``resume_step``: the step of the checkpoint that a run resumes from. Lines of later steps, and an incomplete last
    line, are removed, because these steps are repeated. None: start with an empty file.
    """

    def __init__(self, path: Path, step_key: str, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_until(path, step_key, resume_step)
        # The file is replaced atomically, so that a crash here loses nothing.
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)
        # backslashreplace: UTF-8 has no code for half of a surrogate pair, but JSON has an escape.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def append(self, *objects: Mapping[str, Any]) -> None:
        for item in objects:
            self._file.write(json.dumps(item, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JsonlWriter(Writer):
    """``metrics.jsonl``: one object per step, with ``trainer/step``. Values that are not finite are null."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._file = JsonlFile(path, names.STEP, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.append({**{name: _json_number(value) for name, value in values.items()}, names.STEP: step})

    def close(self) -> None:
        self._file.close()


class SamplesWriter(Writer):
    """``samples.jsonl``: one object per sampled rollout."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._file = JsonlFile(path, "step", resume_step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._file.append(*samples)

    def close(self) -> None:
        self._file.close()


class SummaryWriter(Writer):
    """``summary.json``: the headline values, written at the end of the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # It may be left over from an earlier run.
        path.unlink(missing_ok=True)

    def summarize(self, headline: Mapping[str, float]) -> None:
        values = {name: _json_number(value) for name, value in headline.items()}
        self._path.write_text(json.dumps(values, indent=2) + "\n")


def write_evaluation(path: Path, step: int, rollouts: Iterable[Rollout]) -> None:
    """Writes every rollout of an evaluation, with its reward, in the form of ``samples.jsonl``."""
    file = JsonlFile(path, "step")
    file.append(*(_scored(step, rollout) for rollout in rollouts))
    file.close()


def pick_samples(
    step: int, rollouts: Sequence[Rollout], drafted: Sequence[DraftedResponse] = (), num: int = 4
) -> list[Sample]:
    """Samples of a step: ``num`` evenly spread rollouts, and all ``drafted`` responses."""
    stride = max(1, len(rollouts) // num)
    scored = [_scored(step, rollout) for rollout in rollouts[::stride][:num]]
    return scored + [_drafted(step, response) for response in drafted]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of ``metrics.jsonl`` or ``samples.jsonl``, in order. An incomplete last line is left out."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def _lines_until(path: Path, step_key: str, last_step: int) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line for line in file if line.endswith("\n") and json.loads(line)[step_key] <= last_step]


def _json_number(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _scored(step: int, rollout: Rollout) -> Sample:
    sample = _base(step, rollout.prompt, rollout.generation, rollout.text) | {"reward": rollout.reward}
    if rollout.num_turns > 1:
        sample |= {"turns": list(rollout.turns)}
    return sample if rollout.error is None else sample | {"error": rollout.error}


def _drafted(step: int, response: DraftedResponse) -> Sample:
    text = "".join(piece for piece, _ in response.pieces)
    return _base(step, response.prompt, response.generation, text) | {"pieces": response.pieces}


def _base(step: int, prompt: Prompt, generation: Generation, text: str) -> Sample:
    return {
        "step": step,
        "uid": prompt.uid,
        # A turn that calls tools may have no text.
        "prompt": "\n".join(message.get("content", "") for message in prompt.messages),
        "response": text,
        "finish_reason": generation.finish_reason,
        "policy_version": generation.versions.policy,
        "draft_version": generation.versions.draft,
    }
