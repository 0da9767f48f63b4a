"""When a run saves, and from which checkpoint it resumes. ``checkpoint.dist`` says what a checkpoint holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_spec.checkpoint.folders import contents, latest, name_latest, read_record, rotate, set_aside
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.errors import ConfigError, RestartableError, RunError
from skyrl_spec.settings.compose import to_yaml
from skyrl_spec.settings.schema import Config
from skyrl_spec.settings.words import setting_word
from skyrl_spec.specs.files import require_shapes
from skyrl_spec.specs.model import load_spec, tensor_shapes
from skyrl_spec.types import Component

if TYPE_CHECKING:
    from skyrl_spec.controller.loop import TrainingLoop
    from skyrl_spec.controller.workers import PolicyGroup


def checkpoint_root(config: Config) -> Path:
    """Folder of the run's checkpoints."""
    return Path(config.trainer.run_dir) / "checkpoints"


def find(config: Config, trained: Component) -> Path | None:
    """Checkpoint that the run resumes from, or None if the run starts from the beginning.

    Args:
        trained: component that the checkpoint must hold.

    Raises:
        ConfigError: the checkpoint does not fit this run.
    """
    checkpoint = _find(config)
    if checkpoint is not None:
        _check_fits(config, checkpoint, trained)
    return checkpoint


def _find(config: Config) -> Path | None:
    trainer = config.trainer
    if trainer.resume_mode == "latest":
        return latest(checkpoint_root(config))
    if trainer.resume_mode == "from_path":
        assert trainer.resume_path is not None
        return Path(trainer.resume_path)
    return None


def _check_fits(config: Config, directory: Path, trained: Component) -> None:
    """Checks what the checkpoint's record shows, before any process starts. ``dist.load`` checks the rest."""
    components, setting = read_record(directory)["parts"], f"trainer.resume_path={directory}"
    if trained not in components:
        fix = "it is a checkpoint of a warm-up: export it, or resume it with skyrl-spec warmup-draft"
        raise ConfigError(f"{setting}: holds no {trained}; {fix if trained == 'policy' else 'take one with a draft'}")
    dtype, wanted = config.trainer.policy.megatron_config.dtype, components[trained]["dtypes"]
    if wanted != [dtype]:
        raise ConfigError(
            f"trainer.policy.megatron_config.dtype={dtype}: {setting} was trained in {'+'.join(wanted)}; "
            f"set it to {wanted[0]}"
        )
    # The shapes of a draft from scratch are not decided yet.
    if trained == "policy":
        model = config.trainer.policy.model.path
        require_shapes(
            components["policy"]["shapes"],
            tensor_shapes(load_spec(model)),
            f"trainer.policy.model.path={model}",
            setting,
        )


def begin(config: Config, resume_from: Path | None) -> None:
    """Makes the run's folder this run's.

    Checkpoints of an earlier run are moved aside, unless the run resumes from one of them.
    """
    if resume_from is not None and _is_in_run(config, resume_from):
        name_latest(resume_from)
        return
    earlier = set_aside(checkpoint_root(config))
    if earlier is not None:
        print(
            f"skyrl-spec: the checkpoints of an earlier run are in {earlier} now (to go on from them: "
            f"trainer.resume_mode=from_path {setting_word('trainer.resume_path', earlier / 'step_N')}); remove it if "
            "it is of no use",
            file=sys.stderr,
        )


def newest(config: Config) -> Path | None:
    """Newest checkpoint of the run, from which ``trainer.resume_mode=latest`` resumes."""
    return latest(checkpoint_root(config))


def _is_in_run(config: Config, directory: Path) -> bool:
    return directory.resolve().parent == checkpoint_root(config).resolve()


def resume(trainer: TrainingLoop, policy: PolicyGroup, directory: Path) -> None:
    """Restores workers, engines and the driver's state. Prints a line if only one side has a draft."""
    has_draft, had_draft = trained_kind(trainer.config.trainer) is not None, "draft" in contents(directory)
    if has_draft and not had_draft:
        print(f"skyrl-spec: {directory} has no draft: the draft starts as it is configured", file=sys.stderr)
    if had_draft and not has_draft:
        print(f"skyrl-spec: {directory} has a draft, which is dropped: no draft is enabled", file=sys.stderr)
    trainer.load_state_dict(policy.load_checkpoint(directory.resolve())["trainer"])


class Checkpointer:
    """Saves the last completed step when that is due, or when the run is stopped."""

    def __init__(self, trainer: TrainingLoop, policy: PolicyGroup):
        self._trainer, self._policy = trainer, policy
        self._settings, self._root = trainer.config.trainer, checkpoint_root(trainer.config)
        self._last: tuple[int, dict[str, Any]] | None = None
        self._tried_step: int | None = None
        # Last checkpoint that this run saved.
        self.saved: Path | None = None

    def after_step(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the driver's state after ``step`` and its metrics, and saves if that is due."""
        self._last = (
            step,
            {
                "trainer": self._trainer.state_dict(step),
                "config": to_yaml(self._trainer.config),
                "metrics": {name: value for name, value in values.items() if math.isfinite(value)},
            },
        )
        interval = self._settings.ckpt_interval
        if interval > 0 and step % interval == 0:
            self._save_or_say()

    def after_run(self) -> None:
        """Saves the last step, unless that was just tried."""
        if self._settings.ckpt_interval > 0 and self._last is not None and self._last[0] != self._tried_step:
            self._save_or_say()

    def save_last(self) -> Path | None:
        """Saves the last completed step; returns its checkpoint, or None if no step is complete.

        Raises:
            RunError: the checkpoint could not be written.
        """
        if self._last is None:
            return None
        step, extra = self._last
        directory = self._root / f"step_{step}"
        if self.saved != directory:
            self._policy.save_checkpoint(directory.resolve(), extra)
            self.saved = directory
            for line in rotate(self._root, self._settings.max_ckpts_to_keep):
                print(f"skyrl-spec: {line}", file=sys.stderr)
            if self._settings.hf_save_interval and step % self._settings.hf_save_interval == 0:
                target = self._root.with_name("exports") / directory.name
                self._policy.export_checkpoint(directory.resolve(), target.resolve())
        return directory

    def _save_or_say(self) -> None:
        self._tried_step = None if self._last is None else self._last[0]
        try:
            self.save_last()
        except Exception as error:
            # Ray wraps an exception of a worker.
            cause = getattr(error, "cause", error)
            may_go_on = isinstance(cause, RunError) and not isinstance(cause, RestartableError)
            if not may_go_on or self._settings.on_ckpt_failure == "error":
                raise
            print(f"skyrl-spec: warning: {cause}", file=sys.stderr)
