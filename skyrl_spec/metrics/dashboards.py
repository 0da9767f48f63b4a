"""Where people watch a run from a browser: wandb and TensorBoard. The keys are those of ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.metrics.writers import Sample, Writer

_SAMPLE_COLUMNS = ("step", "prompt", "response", "reward", "policy_version", "draft_version")


class WandbWriter(Writer):
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
        # Every chart over the run's own step; wandb groups charts by what stands before a key's slash.
        self._run.define_metric(names.STEP)
        self._run.define_metric("*", step_metric=names.STEP)
        # Rows are added, not sent again.
        self._samples = wandb.Table(columns=list(_SAMPLE_COLUMNS), log_mode="INCREMENTAL")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, names.STEP: step}, step=step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        scored = [sample for sample in samples if "reward" in sample]
        for sample in scored:
            self._samples.add_data(*(sample[column] for column in _SAMPLE_COLUMNS))
        if scored:
            self._run.log({"samples": self._samples}, step=step)

    def summarize(self, headline: Mapping[str, float]) -> None:
        self._run.summary.update(dict(headline))

    def close(self) -> None:
        """Ends the run, and wandb's own process."""
        import wandb

        self._run.finish()
        wandb.teardown()


class TensorBoardWriter(Writer):
    """Event files in ``directory``, for ``tensorboard --logdir``; values that are not finite are left out.

    ``resume_step``: TensorBoard then hides what was written of later steps.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter as EventFiles

        self._events = EventFiles(str(directory), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for index, sample in enumerate(sample for sample in samples if "reward" in sample):
            quoted = indent(sample["response"], "    ")
            text = f"{sample['prompt']}\n\n{quoted}\n\nreward {sample['reward']:g}"
            self._events.add_text(f"samples/{index}", text, step)

    def summarize(self, headline: Mapping[str, float]) -> None:
        for name, value in headline.items():
            self._events.add_scalar(name, value, 0)

    def close(self) -> None:
        self._events.close()


def check_wandb() -> None:
    """Raises ``ConfigError`` if ``wandb.init`` would ask for a key on the terminal."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return
        credentials = wbauth.authenticate_session(host=settings.base_url, source="skyrl_spec", prompt=False)
    except wandb.errors.Error as error:
        raise ConfigError(_wandb_line(" ".join(str(error).split()))) from error
    finally:
        # ``setup`` starts a process of wandb's own.
        wandb.teardown()
    if credentials is None:
        raise ConfigError(_wandb_line("wandb has no key"))


def _wandb_line(problem: str) -> str:
    return (
        f"trainer.logger=[wandb]: {problem}; set WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline to log "
        "without an account, or take wandb out of trainer.logger"
    )
