"""The command ``skyrl-spec doctor``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skyrl_spec.controller.signals import SignalWatch
from skyrl_spec.doctor.files import file_findings
from skyrl_spec.doctor.finding import FAIL, Finding, closing_line, write_findings
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.evaluation.target import open_target
from skyrl_spec.planning.preflight import num_gpus
from skyrl_spec.settings.algorithm import DynamicSamplingConfig, OverlongConfig
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.options import DoctorOptions, EvalDraftOptions
from skyrl_spec.settings.schema import Config, GeneratorConfig, TrainerConfig
from skyrl_spec.specs.files import model_directory, read_config

# Lengths of the checks, where the configuration has longer ones.
_NUM_PROMPTS, _NUM_SAMPLES, _RESPONSE_LENGTH = 8, 4, 64
# Steps that a later sync must bring to the engines: large ones.
_POLICY_LR, _DRAFT_LR = 1e-4, 1e-3


def run(options: DoctorOptions, words: list[str], watch: SignalWatch, *, verbose: bool) -> int:
    """Prints a finding after the other and writes all to ``options.out``. Returns the exit code: 1 if a check failed.

    Raises:
        ConfigError: the target cannot be found, or a word is no setting.
    """
    found: list[Finding] = []
    with ExitStack() as stack:
        config = _config(options, words, stack)
        for finding in _findings(config, watch, thorough=options.thorough, verbose=verbose):
            found.append(finding)
            print("\n".join(finding.lines()), flush=True)
    write_findings(Path(options.out), found)
    print(f"\n{closing_line(found)}; written to {options.out}")
    return 1 if any(finding.state == FAIL for finding in found) else 0


def _findings(config: Config, watch: SignalWatch, *, thorough: bool, verbose: bool) -> Iterator[Finding]:
    failed = False
    for finding in file_findings(config):
        failed |= finding.state == FAIL
        yield finding
    if failed:
        return
    # Imported late: Ray and torch are not needed for the checks above.
    from skyrl_spec.controller.loop import TrainingLoop
    from skyrl_spec.controller.placement import ray_session
    from skyrl_spec.controller.run import on_cluster
    from skyrl_spec.controller.task import load_task
    from skyrl_spec.doctor.live import Patient
    from skyrl_spec.doctor.reload import reloaded

    print("starting engines and workers (-v shows what they print)", file=sys.stderr, flush=True)
    components: Any = ["policy", "draft"] if trained_kind(config.trainer) is not None else ["policy"]
    try:
        task = load_task(config)
        with on_cluster(task, TrainingLoop, components, watch, verbose) as running, watch.installed():
            patient = Patient(running, task)
            yield from patient.findings(thorough=thorough)
        if patient.exported is not None:
            with ray_session(verbose), watch.installed():
                yield reloaded(task.config, patient.exported, patient.limit)
    except (ConfigError, RunError) as error:
        if watch.received is not None:
            raise
        yield Finding("engines and workers", FAIL, str(error), "-v shows what they print")


def _config(options: DoctorOptions, words: list[str], stack: ExitStack) -> Config:
    """The configuration to check, with short steps and a temporary folder."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="skyrl-doctor-")))
    config = load_config([*_target_words(options, folder, stack), *words])
    return replace(
        config, trainer=_short_trainer(config.trainer, folder / "run"), generator=_short_generator(config.generator)
    )


def _short_trainer(trainer: TrainerConfig, run_dir: Path) -> TrainerConfig:
    kind = trained_kind(trainer)
    if kind is not None:
        optimizer = replace(kind.settings(trainer).optimizer_config, lr=_DRAFT_LR, num_warmup_steps=0)
        trainer = kind.with_settings(trainer, optimizer_config=optimizer)
    # The run's engines draft without it.
    trainer = replace(trainer, dflash=replace(trainer.dflash, export_rope_scaling=None))
    on_cpu = trainer.placement.device == "cpu"
    model = replace(trainer.policy.model, path=str(model_directory(trainer.policy.model.path)))
    optimizer = replace(trainer.policy.optimizer_config, lr=_POLICY_LR, num_warmup_steps=0)
    # Neither the filter nor the penalty fits few short responses.
    algorithm = replace(trainer.algorithm, dynamic_sampling=DynamicSamplingConfig(), overlong=OverlongConfig())
    return replace(
        trainer,
        run_dir=str(run_dir),
        logger=[],
        resume_mode=None,
        resume_path=None,
        train_batch_size=_NUM_PROMPTS,
        policy_mini_batch_size=_NUM_PROMPTS,
        epochs=1,
        max_training_steps=1,
        algorithm=algorithm,
        eval_interval=0,
        eval_before_train=False,
        measure_speedup=False,
        ckpt_interval=0,
        hf_save_interval=0,
        policy=replace(trainer.policy, model=model, optimizer_config=optimizer),
        canary=replace(
            trainer.canary, enabled=True, interval=1, on_mismatch="error", lossless_interval=1 if on_cpu else 0
        ),
    )


def _short_generator(generator: GeneratorConfig) -> GeneratorConfig:
    length = min(generator.sampling_params.max_generate_length, _RESPONSE_LENGTH)
    return replace(
        generator,
        n_samples_per_prompt=_NUM_SAMPLES,
        zero_reward_on_non_stop=False,
        apply_overlong_filtering=False,
        speculation=replace(generator.speculation, schedule="fixed"),
        sampling_params=replace(generator.sampling_params, max_generate_length=length),
        # Not used, but checked.
        eval_sampling_params=replace(generator.eval_sampling_params, max_generate_length=length),
    )


def _target_words(options: DoctorOptions, folder: Path, stack: ExitStack) -> list[str]:
    """Settings for ``target`` and ``draft``; none without a target, whose settings name the model."""
    if not options.target:
        if options.draft:
            raise ConfigError(f"draft={options.draft}: is used with target only; set trainer.dflash.path instead")
        return []
    model, draft = _directories(options, stack)
    device = "cuda" if num_gpus() else "cpu"
    words = [
        f"trainer.policy.model.path={model}",
        f"trainer.placement.device={device}",
        f"trainer.policy.megatron_config.dtype={'bf16' if device == 'cuda' else 'fp32'}",
        f"data.train_data=[{_write_rows(folder)}]",
        "trainer.max_prompt_length=64",
        "trainer.placement.policy_num_gpus_per_node=1",
    ]
    if draft is not None:
        block = read_config(draft, "draft").get("block_size", 2)
        words += ["trainer.dflash.enabled=true", f"trainer.dflash.path={draft}"]
        return [*words, f"trainer.dflash.num_speculative_tokens={min(7, block - 1)}"]
    if read_config(model, "target").get("num_nextn_predict_layers"):
        words += ["trainer.mtp.enabled=true", "trainer.mtp.num_speculative_tokens=3"]
    return words


def _directories(options: DoctorOptions, stack: ExitStack) -> tuple[Path, Path | None]:
    """Directories of the model and of a draft with its own. The target may be a run, a checkpoint or a bundle too."""
    path = Path(options.target)
    if (path / "config.json").is_file() or not path.is_dir():
        draft = None if options.draft is None else model_directory(options.draft, "draft")
        return model_directory(options.target, "target"), draft
    target = stack.enter_context(open_target(EvalDraftOptions(target=options.target, draft=options.draft)))
    return target.model, target.draft


def _write_rows(folder: Path) -> Path:
    """Small sums, for a target without data of its own."""
    path = folder / "rows.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{first}+{second}="}],
            "env_class": "gsm8k",
            "reward_spec": {"method": "rule", "ground_truth": str(first + second)},
        }
        for first in range(2, 6)
        for second in range(2, 6)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
