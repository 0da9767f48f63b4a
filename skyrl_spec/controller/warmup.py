"""``skyrl-spec warmup-draft``: the training step with the policy frozen.

The engines generate responses to the training prompts with the policy and the current draft. The draft is trained on
them and synced. vLLM measures acceptance in every step, as in training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote

from skyrl_spec.checkpoint.serving import serve_command
from skyrl_spec.controller.output import Output, open_output
from skyrl_spec.controller.run import on_cluster, run_job, run_steps, with_restarts
from skyrl_spec.controller.signals import SignalWatch
from skyrl_spec.controller.task import Task, load_task
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.draft import DraftTrainingConfig
from skyrl_spec.settings.schema import Config
from skyrl_spec.settings.words import setting_word


def warmup_config(config: Config) -> Config:
    """Configuration of a warm-up: its own folder, steps and optimizer, without the policy's objective.

    Raises:
        ConfigError: no draft is enabled.
    """
    trainer = config.trainer
    kind = trained_kind(trainer)
    if kind is None:
        raise ConfigError(
            "trainer.dflash.enabled=false: there is no draft to warm up; "
            "set it to true, or trainer.mtp.enabled=true for an MTP head"
        )
    warmup = trainer.warmup
    dynamic_sampling = replace(trainer.algorithm.dynamic_sampling, type=None)
    trainer = kind.with_settings(
        trainer, optimizer_config=warmup.optimizer_config, positions_per_step=warmup.positions_per_step
    )
    if warmup.from_scratch:
        trainer = kind.with_path(trainer, None)
    return replace(
        config,
        trainer=replace(
            trainer,
            algorithm=replace(trainer.algorithm, use_kl_loss=False, dynamic_sampling=dynamic_sampling),
            draft=DraftTrainingConfig(),
            # Prompts repeat until all steps are done.
            epochs=2**31,
            run_dir=warmup.run_dir or f"{trainer.run_dir}_warmup",
            run_name=f"{trainer.run_name}_warmup",
            update_epochs_per_batch=warmup.update_epochs_per_batch,
            measure_speedup=False,
        ),
    )


def as_warmup(task: Task) -> Task:
    """``task`` with the number of steps of the warm-up and a frozen policy. Its config is a ``warmup_config``."""
    return replace(task, steps=task.config.trainer.warmup.num_steps, trains_policy=False)


def run_warmup(config: Config, *, verbose: bool = False) -> int:
    """Runs a warm-up; returns the process's exit code. ``config`` is a ``warmup_config``."""
    return run_job(_warm_up, config, verbose=verbose)


def _warm_up(config: Config, verbose: bool, watch: SignalWatch) -> None:
    def attempt(resume_from: Path | None) -> None:
        task = as_warmup(load_task(_with_fresh_draft(config), resume_from))
        with open_output(task) as output:
            _warm_up_on_cluster(task, output, verbose, watch)

    with_restarts(config, "draft", watch, attempt)


def _with_fresh_draft(config: Config) -> Config:
    """``config`` with the path of its starting draft. Writes that draft first if it is from scratch."""
    kind = trained_kind(config.trainer)
    assert kind is not None
    return kind.write_fresh(config) if config.trainer.warmup.from_scratch else config


def _warm_up_on_cluster(task: Task, output: Output, verbose: bool, watch: SignalWatch) -> None:
    from skyrl_spec.controller.loop import DraftWarmup

    with on_cluster(task, DraftWarmup, ["draft"], watch, verbose) as running:
        run_steps(running, task, output, watch)
        with running.trainer.shifts.scoring():
            running.policy.save_draft_hf(output.run_dir.resolve())
    output.summarize(next_commands=_next_commands(task.config, output.run_dir))


def _next_commands(config: Config, run_dir: Path) -> list[str]:
    kind = trained_kind(config.trainer)
    assert kind is not None
    policy, draft = config.trainer.policy.model.path, f"{run_dir}/draft"
    if kind.has_own_directory:
        start = setting_word(f"trainer.{kind.method}.path", draft)
    else:
        policy = f"{run_dir}/model"
        start = setting_word("trainer.policy.model.path", policy)
    serve = serve_command(config.trainer, policy, draft)
    return [f"skyrl-spec train ... {start}", serve, f"skyrl-spec report {quote(str(run_dir))}"]
