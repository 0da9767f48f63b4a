"""Where metrics and samples go: JSONL files of the run, and wandb."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from skyrl_spec.config import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.types import Rollout


class MetricsWriter(Protocol):
    """Takes the values of one step, evaluation included, once a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


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


class JsonlWriter:
    """``metrics.jsonl``: one object a step, with ``trainer/step``; what is not finite is null."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._file = JsonlFile(path, names.STEP, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.append({**{name: _json_number(value) for name, value in values.items()}, names.STEP: step})

    def close(self) -> None:
        self._file.close()


class SamplesWriter:
    """``samples.jsonl``: a few rollouts of each step, evenly spread over them."""

    def __init__(self, path: Path, resume_step: int | None = None, num_per_step: int = 4) -> None:
        self._file = JsonlFile(path, "step", resume_step)
        self._num_per_step = num_per_step

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        stride = max(1, len(rollouts) // self._num_per_step)
        self._file.append(*(_sample(step, rollout) for rollout in rollouts[::stride][: self._num_per_step]))

    def close(self) -> None:
        self._file.close()


class WandbWriter:
    """A wandb run, its files under ``run_dir``. ``WANDB_MODE=offline`` needs no account.

    Raises:
        ConfigError: as ``check_wandb``; or the server cannot be reached or refuses the key.
    """

    def __init__(self, run_dir: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        check_wandb()
        # wandb writes elsewhere, without a word, if the folder does not exist.
        run_dir.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, init_timeout=60)
        try:
            self._run = wandb.init(project=project, name=name, dir=run_dir, config=dict(config), settings=settings)
        except wandb.errors.Error as error:
            raise ConfigError(_wandb_line(" ".join(str(error).split()))) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, names.STEP: step}, step=step)

    def close(self) -> None:
        """Ends the run, and wandb's own process."""
        import wandb

        self._run.finish()
        wandb.teardown()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a ``metrics.jsonl``, in order; a last line cut short is left out."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def check_wandb() -> None:
    """Raises ConfigError where ``wandb.init`` would ask for a key on the terminal."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    if settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        credentials = wbauth.authenticate_session(host=settings.base_url, source="skyrl_spec", prompt=False)
    except wandb.errors.Error as error:
        raise ConfigError(_wandb_line(" ".join(str(error).split()))) from error
    if credentials is None:
        raise ConfigError(_wandb_line("wandb has no key"))


def _wandb_line(problem: str) -> str:
    return (
        f"trainer.logger=[wandb]: {problem}; set WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline to log "
        "without an account, or take wandb out of trainer.logger"
    )


def _lines_until(path: Path, step_key: str, last_step: int) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line for line in file if line.endswith("\n") and json.loads(line)[step_key] <= last_step]


def _json_number(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _sample(step: int, rollout: Rollout) -> dict[str, Any]:
    versions = rollout.generation.versions
    return {
        "step": step,
        "uid": rollout.prompt.uid,
        "prompt": "\n".join(message["content"] for message in rollout.prompt.messages),
        "response": rollout.text,
        "reward": rollout.reward,
        "finish_reason": rollout.generation.finish_reason,
        "policy_version": versions.policy,
        "draft_version": versions.draft,
    } | ({} if rollout.error is None else {"error": rollout.error})
