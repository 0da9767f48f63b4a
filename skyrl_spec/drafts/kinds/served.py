"""The speculative decoding that the engines run: the user's, completed by the draft that is trained."""

from __future__ import annotations

from typing import Any

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.speculation import require_exact_rejection, require_visible_draft
from skyrl_spec.settings.schema import TrainerConfig


def build_speculative_config(trainer: TrainerConfig, user: dict[str, Any] | None) -> dict[str, Any] | None:
    """vLLM's ``speculative_config``: the user's, completed by the trained draft's; None without a draft.

    The user decides what the draft leaves open.

    Raises:
        ConfigError: an option of the user's makes rollouts inexact, or hides the draft from the canary.
    """
    require_exact_rejection(user)
    require_visible_draft(user)
    kind = trained_kind(trainer)
    if kind is None:
        return user
    trained = kind.speculative_config(trainer)
    return trained if user is None else trained | user
