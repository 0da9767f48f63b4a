"""When a run saves, and from where it goes on. What a checkpoint holds is in ``checkpoint.dist``."""

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
from skyrl_spec.specs.files import require_shapes
from skyrl_spec.specs.model import load_spec, tensor_shapes
from skyrl_spec.types import Component

if TYPE_CHECKING:
    from skyrl_spec.controller.actors import PolicyGroup
    from skyrl_spec.controller.loop import TrainingLoop


def checkpoint_root(config: Config) -> Path:
    return Path(config.trainer.run_dir) / "checkpoints"


def find(config: Config, trained: Component) -> Path | None:
    """The checkpoint that the run goes on from, which must hold ``trained``; None: it begins.

    Raises:
        ConfigError: ``trainer.resume_path`` is no complete checkpoint; or the one found is of other training than this.
    """
    found = _find(config)
    if found is not None:
        _check_fits(config, found, trained)
    return found


def _find(config: Config) -> Path | None:
    trainer = config.trainer
    if trainer.resume_mode == "latest":
        return latest(checkpoint_root(config))
    if trainer.resume_mode == "from_path":
        assert trainer.resume_path is not None
        return Path(trainer.resume_path)
    return None


def _check_fits(config: Config, directory: Path, trained: Component) -> None:
    """What the record tells already, before anything is started; ``dist.load`` looks at the rest."""
    parts, setting = read_record(directory)["parts"], f"trainer.resume_path={directory}"
    if trained not in parts:
        mend = "the checkpoint is of a warm-up: export it, or go on with skyrl-spec warmup-draft"
        raise ConfigError(
            f"{setting}: holds no {trained}; {mend if trained == 'policy' else 'take one of a run with a draft'}"
        )
    dtype, wanted = config.trainer.policy.megatron_config.dtype, parts[trained]["dtypes"]
    if wanted != [dtype]:
        raise ConfigError(
            f"trainer.policy.megatron_config.dtype={dtype}: {setting} was trained in {'+'.join(wanted)}; "
            f"set it to {wanted[0]}"
        )
    # What a draft from scratch looks like is not decided yet.
    if trained == "policy":
        model = config.trainer.policy.model.path
        require_shapes(
            parts["policy"]["shapes"], tensor_shapes(load_spec(model)), f"trainer.policy.model.path={model}", setting
        )


def begin(config: Config, resume_from: Path | None) -> None:
    """What is in the run's folder, and what is newest there, is this run's from now on.

    Checkpoints of an earlier run are set aside, unless the run goes on from one of them.
    """
    if resume_from is not None and _is_in_run(config, resume_from):
        name_latest(resume_from)
        return
    earlier = set_aside(checkpoint_root(config))
    if earlier is not None:
        print(
            f"skyrl-spec: the checkpoints of an earlier run are in {earlier} now (to go on from them: "
            f"trainer.resume_mode=from_path trainer.resume_path={earlier}/step_N); remove it if it is of no use",
            file=sys.stderr,
        )


def newest(config: Config) -> Path | None:
    """The run's last checkpoint, which ``trainer.resume_mode=latest`` finds."""
    return latest(checkpoint_root(config))


def _is_in_run(config: Config, directory: Path) -> bool:
    return directory.resolve().parent == checkpoint_root(config).resolve()


def resume(trainer: TrainingLoop, policy: PolicyGroup, directory: Path) -> None:
    """Workers, engines and the driver's state as they were; a draft that one side alone has is said."""
    has_draft, had_draft = trained_kind(trainer.config.trainer) is not None, "draft" in contents(directory)
    if has_draft and not had_draft:
        print(f"skyrl-spec: {directory} has no draft: the draft starts as it is configured", file=sys.stderr)
    if had_draft and not has_draft:
        print(f"skyrl-spec: {directory} has a draft, which is dropped: no draft is enabled", file=sys.stderr)
    trainer.load_state_dict(policy.load_checkpoint(directory.resolve())["trainer"])


class Checkpointer:
    """Knows what to save after the last step that was done, and saves it when it is due, or when the run is stopped."""

    def __init__(self, trainer: TrainingLoop, policy: PolicyGroup):
        self._trainer, self._policy = trainer, policy
        self._settings, self._root = trainer.config.trainer, checkpoint_root(trainer.config)
        self._last: tuple[int, dict[str, Any]] | None = None
        self._tried_step: int | None = None
        # The checkpoint of this run that was saved last.
        self.saved: Path | None = None

    def after_step(self, step: int, values: Mapping[str, float]) -> None:
        """Remember the state of the step, and its metrics, and save it if it is due."""
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
        """Save the last step, unless that was just tried."""
        if self._settings.ckpt_interval > 0 and self._last is not None and self._last[0] != self._tried_step:
            self._save_or_say()

    def save_last(self) -> Path | None:
        """The last step that was done; None if there was none.

        Raises:
            RunError: it could not be written.
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
            # Of a worker, it comes wrapped.
            cause = getattr(error, "cause", error)
            may_go_on = isinstance(cause, RunError) and not isinstance(cause, RestartableError)
            if not may_go_on or self._settings.on_ckpt_failure == "error":
                raise
            print(f"skyrl-spec: warning: {cause}", file=sys.stderr)
