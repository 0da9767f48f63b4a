"""The course of ``skyrl-spec eval-draft``."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from skyrl_spec.config import Config, ConfigError, SamplingConfig
from skyrl_spec.data.tokenizer import load_tokenizer
from skyrl_spec.evaluation import prompts as prompt_files
from skyrl_spec.evaluation.target import Target, open_target
from skyrl_spec.options import EvalDraftOptions
from skyrl_spec.types import Prompt

if TYPE_CHECKING:
    from skyrl_spec.evaluation.measure import Measurement
    from skyrl_spec.rollout.engine import EngineSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What ``EvalDraftOptions`` leave open is decided: by the run that the target is of, else by a default."""

    device: str
    dtype: str
    sampling: SamplingConfig
    max_prompt_length: int
    files: list[str]
    token_counts: list[int]
    out: Path


def run(options: EvalDraftOptions, *, verbose: bool) -> None:
    """Measure, print the table as it fills, and write the JSON file.

    Raises:
        ConfigError: an option that cannot be.
        RunError: vLLM does not load the model with the draft.
    """
    _check(options)
    with open_target(options) as target:
        plan = _plan(options, target)
        prompts = prompt_files.load(plan.files, load_tokenizer(target.model, "target"), plan.max_prompt_length)
        _check_writable(plan.out)
        for name, value in _facts(options, plan, target, len(prompts)).items():
            print(f"{name:<10}{value}")
        results = _measure(options, plan, target, prompts, verbose=verbose)
    # Ray and torch are there by now.
    from skyrl_spec.evaluation.result import as_json, recommendation_lines

    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {plan.device}, {plan.dtype}",
        "prompts": plan.files,
        "rounds": options.rounds,
    }
    plan.out.write_text(json.dumps(as_json(target, results, plan.sampling, about), indent=2) + "\n")
    print("\nrecommended number of draft tokens (k)")
    for line in recommendation_lines(results):
        print(f"  {line}")
    print(f"  written to {plan.out}")


def _measure(
    options: EvalDraftOptions, plan: Plan, target: Target, prompts: list[Prompt], *, verbose: bool
) -> list[Measurement]:
    # Once everything that can be refused has been.
    from skyrl_spec.evaluation.measure import measure
    from skyrl_spec.evaluation.result import table_header, table_row
    from skyrl_spec.trainer.placement import ray_session

    def show(measured: list[Measurement]) -> None:
        for item in measured:
            print(table_row(item), flush=True)

    print(f"starting engines (-v shows what they print)\n\n{table_header()}", flush=True)
    with ray_session(verbose):
        return measure(
            _engine_settings(options, plan, target),
            {count: target.speculative_config(count) for count in plan.token_counts},
            prompts,
            plan.sampling,
            options.batch_sizes,
            rounds=options.rounds,
            min_rollouts=options.min_rollouts,
            on_measured=show,
        )


def _check(options: EvalDraftOptions) -> None:
    for name in ("batch_sizes", "num_speculative_tokens"):
        values = getattr(options, name)
        if values is not None and (not values or min(values) < 1):
            raise ConfigError(f"{name}={values}: must be numbers of at least 1; change it")
    for name in ("rounds", "min_rollouts", "tensor_parallel_size", "max_prompt_length", "max_generate_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1; change it")
    if options.temperature is not None and not options.temperature >= 0:
        raise ConfigError(f"temperature={options.temperature:g}: must be at least 0; change it")
    for name, allowed in (("device", ("cpu", "cuda")), ("dtype", ("fp32", "bf16"))):
        value = getattr(options, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}={value}: must be {' or '.join(allowed)}; choose one")


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"out={path}: cannot be written; name a file in a directory that is there")


def _plan(options: EvalDraftOptions, target: Target) -> Plan:
    run = target.run or _without_run()
    device = _first(options.device, run.trainer.placement.device)
    dtype = None if target.run is None else run.trainer.policy.megatron_config.dtype
    sampling = run.generator.sampling_params
    return Plan(
        device=device,
        dtype=_first(options.dtype, dtype, "fp32" if device == "cpu" else "bf16"),
        sampling=SamplingConfig(
            temperature=_first(options.temperature, sampling.temperature),
            max_generate_length=_first(options.max_generate_length, sampling.max_generate_length),
        ),
        max_prompt_length=_first(options.max_prompt_length, run.trainer.max_prompt_length),
        files=_first(options.prompts, run.data.val_data),
        token_counts=target.token_counts(options.num_speculative_tokens),
        out=Path(options.out) if options.out else target.home / "eval_draft.json",
    )


def _without_run() -> Config:
    """The defaults of a target that was not trained here."""
    config = Config()
    config.generator.sampling_params.max_generate_length = 128
    config.trainer.placement.device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    return config


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def _engine_settings(options: EvalDraftOptions, plan: Plan, target: Target) -> EngineSettings:
    from skyrl_spec.rollout.engine import EngineSettings
    from skyrl_spec.trainer.placement import num_cores

    on_cpu = plan.device == "cpu"
    return EngineSettings(
        model_path=str(target.model.resolve()),
        dtype=plan.dtype,
        device=plan.device,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=plan.max_prompt_length + plan.sampling.max_generate_length,
        max_num_seqs=max(options.batch_sizes),
        # Two engines share a GPU.
        gpu_memory_utilization=0.4 if options.tensor_parallel_size == 1 else 0.8,
        # Compiling takes longer than an evaluation.
        enforce_eager=on_cpu,
        seed=options.seed,
        weight_sync_backend="ray" if on_cpu else "nccl",
        num_threads=num_cores() if on_cpu else None,
    )


def _facts(options: EvalDraftOptions, plan: Plan, target: Target, num_prompts: int) -> dict[str, str]:
    return {
        "target": target.name,
        "draft": target.method if options.draft is None else f"{target.method}, {target.draft}",
        "prompts": f"{num_prompts} of {', '.join(plan.files)}",
        "sampling": f"temperature {plan.sampling.temperature:g}, up to {plan.sampling.max_generate_length} tokens",
        "engines": f"{plan.device}, TP {options.tensor_parallel_size}, {plan.dtype}",
        "rounds": f"{options.rounds}, with and without the draft by turns; medians are shown",
    }
