"""Speculative decoding of the engines: the user's options, completed by those of the trained draft."""

from __future__ import annotations

from typing import Any

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.speculation import require_exact_rejection, require_visible_draft
from skyrl_spec.settings.schema import TrainerConfig


def build_speculative_config(trainer: TrainerConfig, user: dict[str, Any] | None) -> dict[str, Any] | None:
    """vLLM's ``speculative_config``: the trained draft's options and the user's, which win. None without a draft.

    Raises:
        ConfigError: an option of the user makes rollouts inexact, or hides the draft from the sync canary.
    """
    require_exact_rejection(user)
    require_visible_draft(user)
    kind = trained_kind(trainer)
    if kind is None:
        return user
    trained = kind.speculative_config(trainer)
    return trained if user is None else trained | user
