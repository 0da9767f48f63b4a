"""Kinds of drafts that can be trained. Each is one ``DraftKind`` object and one entry of ``KINDS``.

- ``kind``: the interface
- ``mtp``, ``dflash``: the kinds
- ``served``: vLLM's speculative_config of a run

Imports no torch.
"""

from __future__ import annotations

from skyrl_spec.drafts.kinds.dflash import DflashKind
from skyrl_spec.drafts.kinds.kind import DraftKind
from skyrl_spec.drafts.kinds.mtp import MtpKind
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.schema import Config, TrainerConfig

KINDS: dict[str, DraftKind] = {kind.method: kind for kind in (MtpKind(), DflashKind())}


def trained_kind(trainer: TrainerConfig) -> DraftKind | None:
    """Kind of the draft that is trained; None without one."""
    return next((kind for kind in KINDS.values() if kind.settings(trainer).enabled), None)


def describe_draft(trainer: TrainerConfig) -> str:
    """One line for the start-up panel."""
    kind = trained_kind(trainer)
    return "none" if kind is None else kind.describe(trainer)


def without_draft(trainer: TrainerConfig) -> TrainerConfig:
    """``trainer`` with no draft trained."""
    for kind in KINDS.values():
        trainer = kind.with_settings(trainer, enabled=False)
    return trainer


def check_one_draft(config: Config) -> None:
    """Raises ``ConfigError`` if more than one draft is enabled."""
    enabled = [kind for kind in KINDS.values() if kind.settings(config.trainer).enabled]
    if len(enabled) > 1:
        raise ConfigError(
            f"{enabled[1].on_setting}=true: one draft at a time, and {enabled[0].on_setting} is true as well; "
            "turn one of them off"
        )
