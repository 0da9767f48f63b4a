"""The runs of a comparison: the same settings with the draft trained, trained at times, frozen or absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from skyrl_spec.drafts.kinds import trained_kind, without_draft
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.allowed import FROM_ONE
from skyrl_spec.settings.derived import training_interval
from skyrl_spec.settings.options import CompareOptions
from skyrl_spec.settings.rules import check_allowed
from skyrl_spec.settings.schema import Config, SpeculationConfig

TRAINED, AUTO, FROZEN, NONE = "trained", "auto", "frozen", "none"


class Arm(NamedTuple):
    """One run of a comparison. ``folder`` is relative to that of the comparison."""

    name: str
    seed: int
    folder: str
    config: Config


def arms(config: Config, options: CompareOptions) -> list[Arm]:
    """All runs, seed by seed, so that a comparison that is stopped has whole seeds.

    Raises:
        ConfigError: ``config`` has no draft, or resumes from a single checkpoint, or an arm is none.
    """
    if trained_kind(config.trainer) is None:
        raise ConfigError(
            "trainer.mtp.enabled=false: compare needs a draft; set it to true, or set trainer.dflash.enabled=true"
        )
    if config.trainer.resume_mode == "from_path":
        raise ConfigError(
            "trainer.resume_mode=from_path: must be latest or null, because each run has its own checkpoints; change it"
        )
    _check(options)
    return [
        _arm(config, name, config.trainer.seed + index, several=options.seeds > 1)
        for index in range(options.seeds)
        for name in options.arms
    ]


def _check(options: CompareOptions) -> None:
    check_allowed("seeds", options.seeds, FROM_ONE)
    shown = f"arms=[{','.join(options.arms)}]"
    if not options.arms or len(set(options.arms)) < len(options.arms):
        raise ConfigError(f"{shown}: must name at least one arm, and none twice; change it")
    for name in options.arms:
        if name not in (TRAINED, AUTO, FROZEN, NONE) and not _is_interval(name):
            raise ConfigError(
                f"{shown}: {name} must be trained, auto, every:N with N of at least 1, frozen or none; change it"
            )


def _is_interval(name: str) -> bool:
    try:
        return name.startswith("every:") and training_interval(name) is not None
    except ValueError:
        return False


def _arm(config: Config, name: str, seed: int, *, several: bool) -> Arm:
    folder = name.replace(":", "_") + (f"/seed_{seed}" if several else "")
    trainer = config.trainer
    trainer = replace(
        trainer,
        seed=seed,
        run_dir=str(Path(trainer.run_dir) / folder),
        run_name=f"{trainer.run_name}_{folder.replace('/', '_')}",
    )
    return Arm(name, seed, folder, _with_draft(replace(config, trainer=trainer), name))


def _with_draft(config: Config, name: str) -> Config:
    """``config`` with the draft as the arm ``name`` says."""
    trainer = config.trainer
    if name == NONE:
        return _untrained(config, None)
    if name == FROZEN:
        kind = trained_kind(trainer)
        assert kind is not None
        served = kind.frozen_config(trainer) | (config.generator.inference_engine.speculative_config or {})
        return _untrained(config, served)
    train = "every_step" if name == TRAINED else name
    return replace(config, trainer=replace(trainer, draft=replace(trainer.draft, train=train)))


def _untrained(config: Config, served: dict[str, Any] | None) -> Config:
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
