"""``skyrl-spec warmup-draft``: the training step with the policy frozen.

The engines answer the training prompts with the policy as it is, using the draft as far as it has come; the draft is
trained on the responses and synced. So acceptance is measured in vLLM in every step, as it is in training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from skyrl_spec.config import Config, ConfigError
from skyrl_spec.draft_spec import trained_draft
from skyrl_spec.serve import serve_command
from skyrl_spec.trainer.output import Output, open_output
from skyrl_spec.trainer.run import on_cluster, run_job, run_steps, with_restarts
from skyrl_spec.trainer.signals import SignalWatch
from skyrl_spec.trainer.task import Task, load_task


def warmup_config(config: Config) -> Config:
    """The run that a warm-up is: its folder, steps and optimizer, and nothing of the policy's objective.

    Raises:
        ConfigError: no draft is enabled.
    """
    trainer = config.trainer
    if trained_draft(trainer) is None:
        raise ConfigError(
            "trainer.dflash.enabled=false: there is no draft to warm up; "
            "set it to true, or trainer.mtp.enabled=true for an MTP head"
        )
    warmup = trainer.warmup
    algorithm = replace(
        trainer.algorithm,
        use_kl_loss=False,
        dynamic_sampling=replace(trainer.algorithm.dynamic_sampling, type=None),
    )
    optimizer = warmup.optimizer_config
    return replace(
        config,
        trainer=replace(
            trainer,
            algorithm=algorithm,
            mtp=replace(trainer.mtp, optimizer_config=optimizer),
            dflash=replace(
                trainer.dflash,
                optimizer_config=optimizer,
                path=None if warmup.from_scratch else trainer.dflash.path,
            ),
            # The prompts are gone through as often as it takes.
            epochs=2**31,
            run_dir=warmup.run_dir or f"{trainer.run_dir}_warmup",
            run_name=f"{trainer.run_name}_warmup",
            update_epochs_per_batch=warmup.update_epochs_per_batch,
            measure_speedup=False,
        ),
    )


def as_warmup(task: Task) -> Task:
    """``task`` of a ``warmup_config``, for as many steps as that says, with the policy frozen."""
    return replace(task, steps=task.config.trainer.warmup.num_steps, trains_policy=False)


def run_warmup(config: Config, *, verbose: bool = False) -> int:
    """Warm a draft up as ``warmup_config`` made ``config``; returns the process's exit code."""
    return run_job(_warm_up, config, verbose=verbose)


def _warm_up(config: Config, verbose: bool, watch: SignalWatch) -> None:
    def attempt(resume_from: Path | None) -> None:
        task = as_warmup(load_task(_with_fresh_head(config), resume_from))
        with open_output(task) as output:
            _warm_up_on_cluster(task, output, verbose, watch)

    with_restarts(config, "draft", watch, attempt)


def _with_fresh_head(config: Config) -> Config:
    """An MTP head from scratch is written into a copy of the policy's checkpoint, as the engines want it."""
    trainer = config.trainer
    if not (trainer.mtp.enabled and trainer.warmup.from_scratch):
        return config
    from skyrl_spec.checkpoint.fresh import write_fresh_mtp
    from skyrl_spec.model_spec import load_spec

    directory = (Path(trainer.run_dir) / "model_start").resolve()
    write_fresh_mtp(load_spec(trainer.policy.model.path), directory, trainer.policy.megatron_config.dtype, trainer.seed)
    model = replace(trainer.policy.model, path=str(directory))
    return replace(config, trainer=replace(trainer, policy=replace(trainer.policy, model=model)))


def _warm_up_on_cluster(task: Task, output: Output, verbose: bool, watch: SignalWatch) -> None:
    from skyrl_spec.trainer.loop import DraftWarmup

    with on_cluster(task, DraftWarmup, ["draft"], watch, verbose) as running:
        run_steps(running, task, output, watch)
        running.policy.save_draft_hf(output.run_dir.resolve())
    output.summarize(next_commands=_next_commands(task.config, output.run_dir))


def _next_commands(config: Config, run_dir: Path) -> list[str]:
    policy, draft = config.trainer.policy.model.path, f"{run_dir}/draft"
    if config.trainer.mtp.enabled:
        policy = f"{run_dir}/model"
        train = f"skyrl-spec train ... trainer.policy.model.path={policy}"
    else:
        train = f"skyrl-spec train ... trainer.dflash.path={draft}"
    return [train, serve_command(config.trainer, policy, draft), f"skyrl-spec report {run_dir}"]
