"""The files of a run: metrics, samples, summary. Dashboards are written by ``dashboards``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skyrl_spec.metrics import names
from skyrl_spec.types import DraftedResponse, Generation, Prompt, Rollout

Sample = dict[str, Any]


class Writer:
    """Takes what a run says of itself; each kind of writer keeps what it is for."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one step, evaluation included, once a step."""

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A few of the step's rollouts."""

    def summarize(self, headline: Mapping[str, float]) -> None:
        """What became of the run (``metrics.headline``), once, at its end."""

    def close(self) -> None:
        """More than once does no harm."""


class JsonlFile:
    """A file of one JSON object a line, each on disk once it is written.

    ``resume_step``: the step of the checkpoint that a run goes on from. Lines of later steps, and one cut short, are
    dropped, since those steps are taken again. None begins an empty file.
    """

    def __init__(self, path: Path, step_key: str, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_until(path, step_key, resume_step)
        # Replaced at once, so that a crash here costs nothing.
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)
        # Half of a surrogate pair, which UTF-8 cannot hold, becomes the escape that JSON has for it.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def append(self, *objects: Mapping[str, Any]) -> None:
        for item in objects:
            self._file.write(json.dumps(item, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JsonlWriter(Writer):
    """``metrics.jsonl``: one object a step, with ``trainer/step``; what is not finite is null."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._file = JsonlFile(path, names.STEP, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.append({**{name: _json_number(value) for name, value in values.items()}, names.STEP: step})

    def close(self) -> None:
        self._file.close()


class SamplesWriter(Writer):
    """``samples.jsonl``."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._file = JsonlFile(path, "step", resume_step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._file.append(*samples)

    def close(self) -> None:
        self._file.close()


class SummaryWriter(Writer):
    """``summary.json``: the headline numbers, once the run is over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # An earlier run's.
        path.unlink(missing_ok=True)

    def summarize(self, headline: Mapping[str, float]) -> None:
        values = {name: _json_number(value) for name, value in headline.items()}
        self._path.write_text(json.dumps(values, indent=2) + "\n")


def pick_samples(
    step: int, rollouts: Sequence[Rollout], drafted: Sequence[DraftedResponse] = (), num: int = 4
) -> list[Sample]:
    """``num`` of a step's rollouts, evenly spread over them, and all responses of which is known what was drafted."""
    stride = max(1, len(rollouts) // num)
    scored = [_scored(step, rollout) for rollout in rollouts[::stride][:num]]
    return scored + [_drafted(step, response) for response in drafted]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of ``metrics.jsonl`` or ``samples.jsonl``, in order; a last line cut short is left out."""
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
    return sample if rollout.error is None else sample | {"error": rollout.error}


def _drafted(step: int, response: DraftedResponse) -> Sample:
    text = "".join(piece for piece, _ in response.pieces)
    return _base(step, response.prompt, response.generation, text) | {"pieces": response.pieces}


def _base(step: int, prompt: Prompt, generation: Generation, text: str) -> Sample:
    return {
        "step": step,
        "uid": prompt.uid,
        "prompt": "\n".join(message["content"] for message in prompt.messages),
        "response": text,
        "finish_reason": generation.finish_reason,
        "policy_version": generation.versions.policy,
        "draft_version": generation.versions.draft,
    }
