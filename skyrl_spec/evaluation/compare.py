"""``skyrl-spec compare``: the same run with the draft trained, frozen and absent.

The three runs (arms) share settings, seeds and data and differ only in the draft. They run one after the other, each in
its own folder of ``trainer.run_dir``. ``arms`` makes their configurations, which could also be run by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyrl_spec.controller.checkpoints import begin
from skyrl_spec.controller.run import run_job, train
from skyrl_spec.controller.signals import SignalWatch
from skyrl_spec.drafts.kinds import trained_kind, without_draft
from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.metrics.headline import first_and_last, headline
from skyrl_spec.metrics.writers import read_jsonl
from skyrl_spec.planning.validation import validate
from skyrl_spec.report.command import write_report
from skyrl_spec.settings.compose import to_yaml
from skyrl_spec.settings.schema import Config, SpeculationConfig

TRAINED, FROZEN, NONE = "trained", "frozen", "none"
# A file in the folder of a finished arm, with its configuration as given.
_ASKED = "compared.yaml"

# Title, key and decimals.
_ROWS = (
    ("reward on held-out prompts", names.EVAL_SCORE, 3),
    ("reward in training", names.AVG_RAW_REWARD, 3),
    ("acceptance length, training", names.acceptance_length("train"), 2),
    ("acceptance length, held-out", names.acceptance_length("eval"), 2),
    ("rollout tokens/s", names.THROUGHPUT, 0),
    ("rollout time, s", names.timing("generate"), 2),
    ("step time, s", names.STEP_TIME, 2),
)


def arms(config: Config) -> dict[str, Config]:
    """The configurations of the three arms.

    Raises:
        ConfigError: ``config`` has no draft, or resumes from a single checkpoint.
    """
    trainer = config.trainer
    kind = trained_kind(trainer)
    if kind is None:
        raise ConfigError(
            "trainer.mtp.enabled=false: compare needs a draft; set it to true, or set trainer.dflash.enabled=true"
        )
    served = kind.frozen_config(trainer) | (config.generator.inference_engine.speculative_config or {})
    if trainer.resume_mode == "from_path":
        raise ConfigError(
            "trainer.resume_mode=from_path: must be latest or null, because each of the three runs has its own "
            "checkpoints; change it"
        )
    configs = {TRAINED: config, FROZEN: _with_draft(config, served), NONE: _with_draft(config, None)}
    return {name: _in_folder(arm, name) for name, arm in configs.items()}


def checked_arms(config: Config) -> dict[str, Config]:
    """``arms``, after ``validate`` of each."""
    configs = arms(config)
    for arm in configs.values():
        validate(arm)
    return configs


def run_comparison(config: Config, *, verbose: bool = False) -> int:
    """Runs all arms, then prints the table and writes ``compare.json`` and the report. Returns the exit code."""
    checked_arms(config)
    return run_job(_compare, config, verbose=verbose)


def _compare(config: Config, verbose: bool, watch: SignalWatch) -> None:
    root, configs = Path(config.trainer.run_dir), arms(config)
    done = {name for name, arm in configs.items() if _is_done(arm)}
    if config.trainer.resume_mode is None:
        # Files of an earlier comparison must not be taken for those of this one.
        for name, arm in configs.items():
            (root / name / _ASKED).unlink(missing_ok=True)
            begin(arm, None)
    for number, (name, arm) in enumerate(configs.items(), start=1):
        print(f"\n== {number} of {len(configs)}: draft {name} ==", flush=True)
        if name in done:
            print(f"already finished: {arm.trainer.run_dir}")
            continue
        train(arm, verbose, watch)
        (root / name / _ASKED).write_text(_asked(arm))
    records = {name: read_jsonl(root / name / "metrics.jsonl") for name in configs}
    result = {name: compared(own) | _summary(root / name) for name, own in records.items()}
    (root / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    page = write_report([root / name for name in configs], root / "report")
    print("\n" + "\n".join([*table(records), speedup_line(result)]))
    print(f"\n  written to {root / 'compare.json'}\n  charts in  {page}")


def compared(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Headline values of an arm, and the means over the second half of its steps, which vary less."""
    values: dict[str, Any] = dict(headline(records))
    for _, key, _ in _ROWS:
        if (mean := _late_mean(records, key)) is not None:
            values[f"late_mean/{key}"] = mean
    return values


def table(records: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """First value, last value and ``late``, the mean of the second half, of each arm. "-" for a missing value."""
    lines = [
        f"{'':<28}" + "".join(f"{f'draft {name}':>24}" for name in records),
        f"{'':<28}" + f"{'first':>8}{'last':>8}{'late':>8}" * len(records),
    ]
    for title, key, decimals in _ROWS:
        cells = []
        for own in records.values():
            pair, late = first_and_last(own, key), _late_mean(own, key)
            numbers = (None, None, None) if pair is None else (*pair, late)
            shown = ("-" if number is None else f"{number:.{decimals}f}" for number in numbers)
            cells.append("".join(f"{text:>8}" for text in shown))
        lines.append(f"{title:<28}" + "".join(cells))
    return lines


def speedup_line(result: Mapping[str, Mapping[str, Any]]) -> str:
    """Rollout speed-up, measured at the end of each arm that has a draft."""
    speedups = (own.get("headline/rollout_speedup") for own in result.values())
    shown = ("-" if speedup is None else f"{speedup:.2f}x" for speedup in speedups)
    return f"{'rollout speed-up, at the end':<28}" + "".join(f"{text:>24}" for text in shown)


def _late_mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [value for record in records if (value := record.get(key)) is not None]
    late = values[len(values) // 2 :]
    return sum(late) / len(late) if late else None


def _summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def _is_done(config: Config) -> bool:
    """Whether a resumed comparison finds this arm finished, with the same settings."""
    asked = Path(config.trainer.run_dir) / _ASKED
    return config.trainer.resume_mode == "latest" and asked.is_file() and asked.read_text() == _asked(config)


def _asked(config: Config) -> str:
    return to_yaml(replace(config, trainer=replace(config.trainer, resume_mode=None)))


def _with_draft(config: Config, served: dict[str, Any] | None) -> Config:
    """``config`` without a trained draft. The engines draft as ``served`` says."""
    generator = config.generator
    engine = replace(generator.inference_engine, speculative_config=served)
    # A table needs a draft.
    speculation = generator.speculation if served is not None else SpeculationConfig()
    return replace(
        config,
        trainer=without_draft(config.trainer),
        generator=replace(generator, inference_engine=engine, speculation=speculation),
    )


def _in_folder(config: Config, name: str) -> Config:
    trainer = config.trainer
    run_dir, run_name = str(Path(trainer.run_dir) / name), f"{trainer.run_name}_{name}"
    return replace(config, trainer=replace(trainer, run_dir=run_dir, run_name=run_name))
