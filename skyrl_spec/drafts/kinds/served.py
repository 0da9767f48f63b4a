"""Speculative decoding of the engines: the user's options, completed by those of the trained draft."""

from __future__ import annotations

from typing import Any

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.speculation import require_exact_rejection, require_no_other_setting, require_visible_draft
from skyrl_spec.settings.schema import Config


def build_speculative_config(config: Config) -> dict[str, Any] | None:
    """vLLM's ``speculative_config``: the trained draft's options and the user's, which win. None without a draft.

    Raises:
        ConfigError: an option of the user makes rollouts inexact, hides the draft from the sync canary, or has a
            setting of its own.
    """
    user = config.generator.inference_engine.speculative_config
    require_exact_rejection(user)
    require_visible_draft(user)
    require_no_other_setting(user)
    kind = trained_kind(config.trainer)
    if kind is None and user is None:
        return None
    trained = {} if kind is None else kind.speculative_config(config.trainer)
    method = config.generator.speculation.draft_sample_method
    sampled = {} if method == "greedy" else {"draft_sample_method": method}
    return trained | (user or {}) | sampled
