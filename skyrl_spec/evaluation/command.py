"""The command ``skyrl-spec eval-draft``."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skyrl_spec.controller.signals import SignalWatch
from skyrl_spec.data.tokenizer import load_tokenizer
from skyrl_spec.errors import ConfigError
from skyrl_spec.evaluation import prompts as prompt_files
from skyrl_spec.evaluation.target import Target, open_target
from skyrl_spec.planning.environment import check_cluster, cluster_address
from skyrl_spec.planning.preflight import num_gpus
from skyrl_spec.settings.describe import describe
from skyrl_spec.settings.options import EvalDraftOptions
from skyrl_spec.settings.rules import check_allowed
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.specs.files import read_config
from skyrl_spec.types import Prompt

if TYPE_CHECKING:
    from skyrl_spec.evaluation.measure import Measurement
    from skyrl_spec.rollout.engine_settings import EngineSettings

T = TypeVar("T")


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation. Options that are null have the value of the target's run, or a default."""

    device: str
    dtype: str
    tensor_parallel_size: int
    sampling: SamplingConfig
    max_prompt_length: int
    engine_init_kwargs: dict[str, Any]
    files: list[str]
    token_counts: list[int]
    out: Path


def run(options: EvalDraftOptions, watch: SignalWatch, *, verbose: bool) -> None:
    """Measures, prints the rows of the table as they are measured, and writes the JSON file.

    Raises:
        ConfigError: an option is wrong, or target, prompts or draft cannot be used.
        RunError: an engine does not start or does not load the model with the draft.
    """
    _check(options)
    with open_target(options) as target:
        settings = _eval_settings(options, target)
        prompts = prompt_files.load(settings.files, load_tokenizer(target.model, "target"), settings.max_prompt_length)
        _check_writable(settings.out)
        for name, value in _facts(options, settings, target, len(prompts)).items():
            print(f"{name:<10}{value}")
        results = _measure(options, settings, target, prompts, watch, verbose=verbose)
    # Imported late: it imports Ray and torch.
    from skyrl_spec.evaluation.result import as_json, category_lines, recommendation_lines, schedule_line

    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {settings.device}, {settings.dtype}",
        "prompts": settings.files,
        "rounds": options.rounds,
    }
    settings.out.write_text(json.dumps(as_json(target, results, settings.sampling, about), indent=2) + "\n")
    if lines := category_lines(results):
        print("\nby category", *lines, sep="\n")
    print("\nrecommended number of draft tokens (k)")
    for line in recommendation_lines(results):
        print(f"  {line}")
    if len(options.batch_sizes) > 1:
        print(f"  for every batch    {schedule_line(results)}")
    print(f"  written to {settings.out}")


def _measure(
    options: EvalDraftOptions,
    settings: EvalSettings,
    target: Target,
    prompts: list[Prompt],
    watch: SignalWatch,
    *,
    verbose: bool,
) -> list[Measurement]:
    # Imported late: Ray and torch are not needed for the checks above.
    from skyrl_spec.controller.placement import ray_session
    from skyrl_spec.evaluation.measure import measure
    from skyrl_spec.evaluation.result import table_header, table_row

    def show(measured: list[Measurement]) -> None:
        for item in measured:
            print(table_row(item), flush=True)

    print(f"starting engines (-v shows their output)\n\n{table_header()}", flush=True)
    # Ray replaces our signal handlers with its own.
    with ray_session(verbose), watch.installed():
        return measure(
            _engine_settings(options, settings, target),
            {count: target.speculative_config(count) for count in settings.token_counts},
            prompts,
            settings.sampling,
            options.batch_sizes,
            rounds=options.rounds,
            min_rollouts=options.min_rollouts,
            seed=options.seed,
            on_measured=show,
        )


def _check(options: EvalDraftOptions) -> None:
    for name in ("batch_sizes", "num_speculative_tokens"):
        values = getattr(options, name)
        if values is not None and (not values or min(values) < 1):
            raise ConfigError(f"{name}={values}: must be a list of numbers of at least 1; change it")
    for setting in describe(EvalDraftOptions):
        check_allowed(setting.name, getattr(options, setting.name), setting.allowed)


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"out={path}: cannot be written; name a file in an existing directory that is writable")


def _eval_settings(options: EvalDraftOptions, target: Target) -> EvalSettings:
    run = target.run or _without_run()
    device = _first(options.device, run.trainer.placement.device)
    engine, trained_in = run.generator.inference_engine, run.trainer.policy.megatron_config.dtype
    dtype = None if target.run is None else engine.dtype or trained_in
    tp = _first(options.tensor_parallel_size, engine.tensor_parallel_size)
    _check_machine(device, tp)
    sampling = run.generator.sampling_params
    settings = EvalSettings(
        device=device,
        dtype=_first(options.dtype, dtype, "fp32" if device == "cpu" else "bf16"),
        tensor_parallel_size=tp,
        sampling=replace(
            sampling,
            temperature=_first(options.temperature, sampling.temperature),
            max_generate_length=_first(options.max_generate_length, sampling.max_generate_length),
        ),
        max_prompt_length=_first(options.max_prompt_length, run.trainer.max_prompt_length),
        engine_init_kwargs=engine.engine_init_kwargs,
        files=_first(options.prompts, run.data.val_data),
        token_counts=target.token_counts(options.num_speculative_tokens),
        out=Path(options.out) if options.out else target.home / "eval_draft.json",
    )
    return _within_positions(options, settings, read_config(target.model, "target").get("max_position_embeddings"))


def _within_positions(options: EvalDraftOptions, settings: EvalSettings, positions: int | None) -> EvalSettings:
    """``settings`` with prompt and response within the model's positions. Only a default length is reduced."""
    room = None if positions is None else positions - settings.sampling.max_generate_length
    if room is None or settings.max_prompt_length <= room:
        return settings
    if options.max_prompt_length is None and room > 0:
        return replace(settings, max_prompt_length=room)
    raise ConfigError(
        f"max_generate_length={settings.sampling.max_generate_length}: its sum with max_prompt_length="
        f"{settings.max_prompt_length} must be at most {positions}, the positions of the model; lower one"
    )


def _check_machine(device: str, tensor_parallel_size: int) -> None:
    check_cluster()
    # With RAY_ADDRESS set the GPUs may be on other machines.
    if device != "cuda" or cluster_address() is not None:
        return
    needed, found = (1 if tensor_parallel_size == 1 else 2 * tensor_parallel_size), num_gpus()
    if found < needed:
        raise ConfigError(
            f"device=cuda: two engines of tensor_parallel_size={tensor_parallel_size} need {needed} GPUs, but this "
            f"machine has {found}; set device=cpu, lower tensor_parallel_size, or join a cluster with RAY_ADDRESS"
        )


def _without_run() -> Config:
    """Defaults for a target without a run."""
    config = Config()
    config.generator.sampling_params.max_generate_length = 128
    config.trainer.placement.device = "cuda" if num_gpus() else "cpu"
    return config


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def _engine_settings(options: EvalDraftOptions, settings: EvalSettings, target: Target) -> EngineSettings:
    from skyrl_spec.controller.placement import num_cores
    from skyrl_spec.rollout.engine_settings import EngineSettings

    on_cpu, tp = settings.device == "cpu", settings.tensor_parallel_size
    return EngineSettings(
        model_path=str(target.model.resolve()),
        dtype=settings.dtype,
        device=settings.device,
        tensor_parallel_size=tp,
        max_model_len=settings.max_prompt_length + settings.sampling.max_generate_length,
        max_num_seqs=max(options.batch_sizes),
        # With tensor_parallel_size=1 the two engines share a GPU.
        gpu_memory_utilization=0.4 if tp == 1 else 0.8,
        # On CPU, compiling takes longer than the evaluation.
        enforce_eager=on_cpu,
        seed=options.seed,
        weight_sync_backend="ray" if on_cpu else "nccl",
        num_threads=num_cores() if on_cpu else None,
        engine_init_kwargs=settings.engine_init_kwargs,
    )


def _facts(options: EvalDraftOptions, settings: EvalSettings, target: Target, num_prompts: int) -> dict[str, str]:
    return {
        "target": target.name,
        "draft": target.method if options.draft is None else f"{target.method}, {target.draft}",
        "prompts": f"{num_prompts} of {', '.join(settings.files)}",
        "sampling": f"temperature {settings.sampling.temperature:g}, "
        f"up to {settings.sampling.max_generate_length} tokens",
        "engines": f"{settings.device}, TP {settings.tensor_parallel_size}, {settings.dtype}",
        "rounds": f"{options.rounds}, alternating with and without the draft; the table shows medians",
    }
