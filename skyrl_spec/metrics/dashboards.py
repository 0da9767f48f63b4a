"""Writers for wandb and TensorBoard, with the keys of ``metrics.jsonl``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.metrics.writers import Sample, Writer

# File with the id of the folder's wandb run.
WANDB_ID = "wandb_id"
_SAMPLE_COLUMNS = ("step", "prompt", "response", "reward", "policy_version", "draft_version")


class WandbWriter(Writer):
    """A wandb run with its files in ``run_dir``. ``WANDB_MODE=offline`` needs no account.

    ``resumes``: the wandb run in whose folder this is goes on. wandb ignores values of steps that it has.

    Raises:
        ConfigError: wandb has no key, or the server cannot be reached or refuses the key.
    """

    def __init__(
        self,
        run_dir: Path,
        project: str,
        name: str,
        config: Mapping[str, Any],
        *,
        tags: Sequence[str] = (),
        resumes: bool = False,
    ) -> None:
        import wandb

        check_wandb()
        # If the folder does not exist, wandb silently writes to another place.
        run_dir.mkdir(parents=True, exist_ok=True)
        settings, id_file = wandb.Settings(silent=True, init_timeout=60), run_dir / WANDB_ID
        earlier: dict[str, Any] = {}
        if resumes and id_file.is_file():
            earlier = {"id": id_file.read_text().strip(), "resume": "allow"}
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                tags=list(tags),
                dir=run_dir,
                config=dict(config),
                settings=settings,
                **earlier,
            )
        except wandb.errors.Error as error:
            raise ConfigError(_wandb_line(" ".join(str(error).split()))) from error
        id_file.write_text(f"{self._run.id}\n")
        # All charts use the run's own step as their x axis.
        self._run.define_metric(names.STEP)
        self._run.define_metric("*", step_metric=names.STEP)
        # INCREMENTAL sends new rows only.
        self._samples = wandb.Table(columns=list(_SAMPLE_COLUMNS), log_mode="INCREMENTAL")
        self._run_dir, self._is_lost = run_dir, False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._send(lambda: self._run.log({**values, names.STEP: step}, step=step))

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        scored = [sample for sample in samples if "reward" in sample]
        for sample in scored:
            self._samples.add_data(*(sample[column] for column in _SAMPLE_COLUMNS))
        if scored:
            self._send(lambda: self._run.log({"samples": self._samples}, step=step))

    def summarize(self, headline: Mapping[str, float]) -> None:
        self._send(lambda: self._run.summary.update(dict(headline)))

    def close(self) -> None:
        """Ends the run and wandb's own process."""
        import wandb

        self._send(self._run.finish)
        # Also where its process has ended: otherwise wandb tries again when Python exits, with a traceback.
        with suppress(ConnectionError):
            wandb.teardown()

    def _send(self, call: Callable[[], object]) -> None:
        """Makes a call of wandb's. If wandb's process has ended, prints one line, once, and makes no more calls.

        wandb's process ends on SIGTERM. A scheduler sends that to all processes, and the run still has to save.
        """
        if self._is_lost:
            return
        try:
            call()
        except ConnectionError:
            self._is_lost = True
            print(
                f"skyrl-spec: warning: wandb's process ended; later metrics are in {self._run_dir}/metrics.jsonl only",
                file=sys.stderr,
            )


class TensorBoardWriter(Writer):
    """Event files in ``directory``, for ``tensorboard --logdir``. Values that are not finite are left out.

    ``resume_step``: the step that a run resumes from. TensorBoard hides values of later steps written before.
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


def check_wandb() -> str | None:
    """Address of wandb's server. None if nothing is sent (``WANDB_MODE``).

    Raises:
        ConfigError: ``wandb.init`` would have to ask for a key on the terminal.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return None
        address = str(settings.base_url)
        credentials = wbauth.authenticate_session(host=address, source="skyrl_spec", prompt=False)
    except wandb.errors.Error as error:
        raise ConfigError(_wandb_line(" ".join(str(error).split()))) from error
    finally:
        # ``setup`` starts a process, which must not outlive the check.
        wandb.teardown()
    if credentials is None:
        raise ConfigError(_wandb_line("wandb has no key"))
    return address


def _wandb_line(problem: str) -> str:
    return (
        f"trainer.logger=[wandb]: {problem}; set WANDB_API_KEY or run `wandb login`, set WANDB_MODE=offline to log "
        "without an account, or remove wandb from trainer.logger"
    )
