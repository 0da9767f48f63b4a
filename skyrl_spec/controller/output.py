"""Files, dashboards and terminal output of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from skyrl_spec.controller.checkpoints import begin
from skyrl_spec.controller.task import Task
from skyrl_spec.drafts.kinds import describe_draft, trained_kind
from skyrl_spec.metrics.console import ConsoleWriter
from skyrl_spec.metrics.dashboards import TensorBoardWriter, WandbWriter
from skyrl_spec.metrics.headline import headline
from skyrl_spec.metrics.writers import JsonlWriter, SamplesWriter, SummaryWriter, Writer, pick_samples, read_jsonl
from skyrl_spec.planning.facts import memory_line, plan_facts
from skyrl_spec.planning.memory import plan_memory
from skyrl_spec.planning.phases import phase_facts
from skyrl_spec.settings.compose import to_yaml
from skyrl_spec.settings.derived import max_staleness, parallel_sizes
from skyrl_spec.settings.schema import Config
from skyrl_spec.types import DraftedResponse, Rollout


@dataclass(frozen=True)
class Output:
    """Destinations of a run's metrics and samples."""

    run_dir: Path
    console: ConsoleWriter
    writers: list[Writer]

    def on_step(
        self, step: int, values: dict[str, float], rollouts: Sequence[Rollout], drafted: Sequence[DraftedResponse]
    ) -> None:
        samples = pick_samples(step, rollouts, drafted)
        for writer in self.writers:
            writer.write(step, values)
            writer.write_samples(step, samples)

    def summarize(self, *, speedup: float | None = None, next_commands: Sequence[str] = ()) -> None:
        """Writes the headline numbers to all writers, and the closing lines to the terminal."""
        records = read_jsonl(self.run_dir / "metrics.jsonl")
        for writer in self.writers:
            writer.summarize(headline(records, speedup))
        self.console.close_with(records, self.run_dir, speedup=speedup, next_commands=next_commands)


@contextmanager
def open_output(task: Task) -> Iterator[Output]:
    """Opens all writers of a run, and shows the start-up panel."""
    trainer, console = task.config.trainer, ConsoleWriter(task.steps)
    begin(task.config, task.resume_from)
    run_dir = Path(trainer.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(task.config))
    writers: list[Writer] = [
        JsonlWriter(run_dir / "metrics.jsonl", task.steps_done),
        SamplesWriter(run_dir / "samples.jsonl", task.steps_done),
        SummaryWriter(run_dir / "summary.json"),
    ]
    if "console" in trainer.logger:
        writers.append(console)
    try:
        if "tensorboard" in trainer.logger:
            writers.append(TensorBoardWriter(run_dir / "tensorboard", task.steps_done))
        if "wandb" in trainer.logger:
            settings: Any = OmegaConf.to_container(OmegaConf.structured(task.config))
            writers.append(
                WandbWriter(
                    run_dir,
                    trainer.project_name,
                    trainer.run_name,
                    settings,
                    tags=trainer.tags,
                    resumes=task.resume_from is not None,
                )
            )
        console.start(facts_of(task))
        _warn_of_truncation(task.config)
        console.note("starting engines and workers (-v shows what they print)")
        yield Output(run_dir, console, writers)
    finally:
        for writer in {console, *writers}:
            writer.close()


def facts_of(task: Task) -> dict[str, str]:
    """Rows of the start-up panel."""
    spec, trainer, generator = task.spec, task.config.trainer, task.config.generator
    return {
        "model": f"{spec.path} ({spec.architecture}, {spec.num_layers} layers x {spec.hidden_size})",
        "draft": _draft_fact(task.config),
        "policy": f"{trainer.placement.device}, {parallel_sizes(task.config)}, {trainer.policy.megatron_config.dtype}",
        "engines": f"{generator.inference_engine.num_engines} x TP {generator.inference_engine.tensor_parallel_size}",
        "batch": f"{trainer.train_batch_size} prompts x {generator.n_samples_per_prompt} samples, "
        f"{trainer.train_batch_size // trainer.policy_mini_batch_size} mini-batches",
        "steps": f"{task.steps} ({task.stream.steps_per_epoch} per epoch){_beside(max_staleness(task.config))}",
        "memory": memory_line(plan_memory(task.config, trains_policy=task.trains_policy)),
        "run": trainer.run_dir,
    } | _resume_fact(task)


def _beside(staleness: int) -> str:
    steps = "1 step" if staleness == 1 else f"{staleness} steps"
    return f", sampled beside training, at most {steps} old" if staleness else ""


def _draft_fact(config: Config) -> str:
    """The draft, and what is unusual about when it drafts and when it is trained."""
    fact, schedule, train = describe_draft(config.trainer), config.generator.speculation.schedule, config.trainer.draft
    if schedule != "fixed":
        fact += f", k by batch: {schedule}"
    if config.generator.speculation.draft_sample_method == "probabilistic":
        fact += ", sampled"
    if train.train != "every_step" and trained_kind(config.trainer) is not None:
        fact += f", training {train.train}"
    return fact


def show_plan(task: Task, *, num_runs: int = 1) -> None:
    """Prints the plan of ``trainer.dry_run``."""
    facts = facts_of(task)
    facts.pop("memory")
    plan = plan_memory(task.config, trains_policy=task.trains_policy)
    console = ConsoleWriter(task.steps)
    console.panel(facts | plan_facts(task.config, plan, num_runs=num_runs) | phase_facts(task.config, plan))
    console.note("dry run: settings, model, data and devices fit; nothing was started or written")


def _resume_fact(task: Task) -> dict[str, str]:
    if task.resume_from is not None:
        return {"resume": f"after step {task.steps_done}, from {task.resume_from}"}
    if task.config.trainer.resume_mode is not None:
        return {"resume": "no checkpoint is there yet: from the beginning"}
    return {}


def _warn_of_truncation(config: Config) -> None:
    """Warns that the trainer's log-probs are not truncated as the engines' sampling is."""
    sampling = config.generator.sampling_params
    if sampling.top_p < 1 or sampling.top_k != -1 or sampling.min_p > 0:
        print(
            f"skyrl-spec: generator.sampling_params truncates (top_p={sampling.top_p}, top_k={sampling.top_k}, "
            f"min_p={sampling.min_p}): the trainer's log-probs are of the whole distribution, so "
            "policy/rollout_train_logprobs_abs_diff_mean has a floor",
            file=sys.stderr,
        )
