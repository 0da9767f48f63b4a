"""Rules for the speculative decoding of the engines. They are checked before any process starts, without vLLM."""

from __future__ import annotations

from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.derived import longest_sequence
from skyrl_spec.settings.schema import Config, SamplingConfig

_SETTING = "generator.inference_engine.speculative_config"

# Options of vLLM's SpeculativeConfig that decide whether rollouts come from the policy's own distribution, and the
# values that keep it exact. "block" verification is exact on paper, but vLLM's V1 sampler, used on CPU, ignores it.
# Adaptive verification drops drafted tokens by how probable the draft finds them, which biases what is kept.
_EXACT_VALUES: dict[str, tuple[Any, ...]] = {
    "rejection_sample_method": ("standard",),
    "synthetic_acceptance_rates": (None,),
    "synthetic_acceptance_length": (None,),
    "enable_adaptive_verification": (False,),
}
# Options that hide the draft from the sync canary, and the values that show it. The recorder reads the drafter's
# logits, which a local argmax never gathers. It takes their argmax for the drafted token, and over the vocabulary that
# two tokenizers share that is another one.
_VISIBLE_VALUES: dict[str, tuple[Any, ...]] = {
    "use_local_argmax_reduction": (False,),
    "use_heterogeneous_vocab": (False,),
}
# Options with a setting of their own.
_OTHER_SETTINGS = {
    "num_speculative_tokens_per_batch_size": "generator.speculation.schedule",
    "draft_sample_method": "generator.speculation.draft_sample_method",
}


def require_exact_rejection(speculative_config: dict[str, Any] | None) -> None:
    """Raises ``ConfigError`` unless drafted tokens go through exact rejection sampling."""
    _require_values(speculative_config, _EXACT_VALUES, "rollouts must come from the policy's own distribution")


def require_visible_draft(speculative_config: dict[str, Any] | None) -> None:
    """Raises ``ConfigError`` for an option that hides from the sync canary what the engines draft."""
    _require_values(speculative_config, _VISIBLE_VALUES, "the sync canary must see what the engines draft")


def require_no_other_setting(speculative_config: dict[str, Any] | None) -> None:
    """Raises ``ConfigError`` for an option of the user that has a setting of its own."""
    for key, value in (speculative_config or {}).items():
        setting = _OTHER_SETTINGS.get(key.replace("-", "_"))
        if setting is not None and value is not None:
            raise ConfigError(f"{_SETTING}.{key}={value}: set {setting} instead; remove the key")


def require_exact_sampling(
    sampling: SamplingConfig, speculative_config: dict[str, Any] | None, setting: str = "generator.sampling_params"
) -> None:
    """Raises ``ConfigError`` for ``min_p`` with a draft: vLLM's rejection sampler does not apply it."""
    if speculative_config is not None and sampling.min_p > 0:
        raise ConfigError(
            f"{setting}.min_p={sampling.min_p}: vLLM does not apply min_p to drafted tokens, so it must be 0 with"
            " speculative decoding; use top_p or top_k, or turn the draft off"
        )


def drafts_under_way(device: str) -> int:
    """Number of drafts that must fit behind a sequence. Without this room an engine stops drafting for its batch.

    They are the draft that is being verified and the next one. On GPUs vLLM schedules a step before it knows what the
    last one accepted and assumes that all was accepted, which makes a third.
    """
    return 2 if device == "cpu" else 3


def missing_positions(config: Config, max_positions: int, num_draft_tokens: int) -> int:
    """Positions that drafts lack behind the longest sequence, because the model has no more. 0: none."""
    room = drafts_under_way(config.trainer.placement.device) * num_draft_tokens
    return min(max(longest_sequence(config) + room - max_positions, 0), room)


def _require_values(config: dict[str, Any] | None, values: dict[str, tuple[Any, ...]], reason: str) -> None:
    for key, value in (config or {}).items():
        # vLLM reads hyphens in the names of options as underscores.
        allowed = values.get(key.replace("-", "_"))
        if allowed is not None and value not in allowed:
            raise ConfigError(
                f"{_SETTING}.{key}={value!r}: {reason}, so only {allowed[0]!r} is allowed; remove the key"
            )
