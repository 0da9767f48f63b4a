"""Kinds of draft loss, and weighted sums of them: ``trainer.{mtp,dflash}.loss_type``."""

from __future__ import annotations

import math

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.allowed import LOSS_TYPES


def parse_loss_type(text: str) -> list[tuple[float, str]]:
    """Weight and kind of every part: ``soft_ce``, or ``0.7*soft_ce+0.3*accept``.

    Raises:
        ValueError: an unknown kind, one that comes twice, or a weight that is no finite number above 0.
    """
    parts = []
    for part in text.split("+"):
        weight, star, kind = part.rpartition("*")
        parts.append((float(weight) if star else 1.0, kind.strip()))
    kinds = [kind for _, kind in parts]
    if not set(kinds) <= set(LOSS_TYPES) or len(set(kinds)) < len(kinds):
        raise ValueError(text)
    if not all(weight > 0 and math.isfinite(weight) for weight, _ in parts):
        raise ValueError(text)
    return parts


def check_loss_type(setting: str, text: str) -> None:
    """Raises ``ConfigError`` unless ``text`` is a loss type."""
    try:
        parse_loss_type(text)
    except ValueError:
        raise ConfigError(
            f"{setting}={text}: must be {' or '.join(LOSS_TYPES)}, or a sum of them with weights above 0, as in "
            "0.7*soft_ce+0.3*accept; change it"
        ) from None
