"""When a run saves, and from which checkpoint it resumes. ``checkpoint.dist`` says what a checkpoint holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    with trainer.shifts.workers():
        state = policy.load_checkpoint(directory.resolve())["trainer"]
    trainer.load_state_dict(state)


@dataclass(frozen=True)
class Completed:
    """A completed step, and the driver's state after it."""

    step: int
    extra: dict[str, Any]


class Checkpointer:
    """Saves the last completed step when that is due, or when the run is stopped.

    With ``async_dist_ckpt_save`` a save that is due is written beside the next steps. After each of them the run checks
    whether it is complete.
    """

    def __init__(self, trainer: TrainingLoop, policy: PolicyGroup):
        self._trainer, self._policy = trainer, policy
        self._settings, self._root = trainer.config.trainer, checkpoint_root(trainer.config)
        self._last: Completed | None = None
        self._tried_step: int | None = None
        # The step that is being written beside training.
        self._begun: int | None = None
        # Steps whose checkpoints are complete and not exported yet.
        self._to_export: list[int] = []
        # Last checkpoint that this run saved.
        self.saved: Path | None = None

    def after_step(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the driver's state after ``step`` and its metrics, and saves if that is due."""
        self._last = Completed(
            step,
            {
                "trainer": self._trainer.state_dict(step),
                "config": to_yaml(self._trainer.config),
                "metrics": {name: value for name, value in values.items() if math.isfinite(value)},
            },
        )
        self._try(lambda: self._finish(wait=False))
        interval = self._settings.ckpt_interval
        if interval > 0 and step % interval == 0:
            self._save_or_say()

    def after_run(self) -> None:
        """Saves the last step, unless that was just tried. Waits for what is being written."""
        if self._settings.ckpt_interval > 0 and self._last is not None and self._last.step != self._tried_step:
            self._save_or_say()
        self._try(lambda: self._finish(wait=True))

    def save_last(self) -> Path | None:
        """Saves the last completed step; returns its checkpoint, or None if no step is complete.

        Raises:
            RunError: the checkpoint could not be written.
        """
        if self._last is None:
            return None
        self._try(lambda: self._complete_begun(wait=True), must_not_raise=True)
        if self.saved != self._directory(self._last.step):
            self._policy.save_checkpoint(self._directory(self._last.step).resolve(), self._last.extra)
            self._complete(self._last.step)
        # Not before, because a scheduler may not wait for it.
        self._export()
        return self.saved

    def finish_after_error(self) -> None:
        """After an error elsewhere: waits for what is being written, if the workers are alive."""
        if self._begun is None:
            return
        try:
            self._policy.check()
        except RunError:
            return
        self._try(lambda: self._complete_begun(wait=True), must_not_raise=True)

    def _directory(self, step: int) -> Path:
        return self._root / f"step_{step}"

    def _save_or_say(self) -> None:
        assert self._last is not None
        self._tried_step = self._last.step
        beside = self._settings.policy.megatron_config.async_dist_ckpt_save
        self._try(self._begin if beside else self.save_last)

    def _begin(self) -> None:
        """Begins to write the last completed step beside training, once an earlier one is written."""
        assert self._last is not None
        self._try(lambda: self._finish(wait=True))
        self._policy.begin_save(self._directory(self._last.step).resolve(), self._last.extra)
        self._begun = self._last.step

    def _finish(self, *, wait: bool) -> None:
        """Completes and exports what was written beside training, if all ranks are done with it."""
        self._complete_begun(wait=wait)
        self._export()

    def _complete_begun(self, *, wait: bool) -> None:
        if (step := self._begun) is None:
            return
        # A failure ends it too.
        self._begun = None
        if self._policy.finish_save(wait=wait):
            self._complete(step)
        else:
            self._begun = step

    def _complete(self, step: int) -> None:
        """Notes that the checkpoint of a step is there. Removes old ones."""
        self.saved = self._directory(step)
        for line in rotate(self._root, self._settings.max_ckpts_to_keep):
            print(f"skyrl-spec: {line}", file=sys.stderr)
        if self._settings.hf_save_interval and step % self._settings.hf_save_interval == 0:
            self._to_export.append(step)

    def _export(self) -> None:
        """Exports complete checkpoints that are to be exported and still there."""
        steps, self._to_export = self._to_export, []
        for directory in map(self._directory, steps):
            if directory.exists():
                target = self._root.with_name("exports") / directory.name
                self._policy.export_checkpoint(directory.resolve(), target.resolve())

    def _try(self, save: Callable[[], object], *, must_not_raise: bool = False) -> None:
        """Saves. With ``trainer.on_ckpt_failure=warn``, a checkpoint that could not be written costs a line."""
        try:
            save()
        except Exception as error:
            # Ray wraps an exception of a worker.
            cause = getattr(error, "cause", error)
            may_go_on = isinstance(cause, RunError) and not isinstance(cause, RestartableError)
            if not must_not_raise and (not may_go_on or self._settings.on_ckpt_failure == "error"):
                raise
            print(f"skyrl-spec: warning: {cause}", file=sys.stderr)
