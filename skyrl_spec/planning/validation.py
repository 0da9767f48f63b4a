"""All rules that need nothing but the settings: those of the settings, of the draft and of the engines."""

from __future__ import annotations

from typing import Any

from skyrl_spec.drafts.kinds import check_one_draft, trained_kind
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.drafts.speculation import require_exact_sampling
from skyrl_spec.rollout.engine_args import require_other_engine_args
from skyrl_spec.settings.rules import SAMPLINGS, check_rules, get_setting, require
from skyrl_spec.settings.schedule import SETTING, check_schedule
from skyrl_spec.settings.schema import Config

_ENGINE = "generator.inference_engine"
# vLLM's methods that draft tokens without a model.
_WITHOUT_DISTRIBUTION = ("ngram", "ngram_gpu", "suffix")


def validate(config: Config) -> None:
    """Checks every rule that needs neither a file nor a device.

    Raises:
        ConfigError: the first rule that ``config`` breaks.
    """
    check_one_draft(config)
    check_rules(config)
    engine = config.generator.inference_engine
    require(
        "speculative_config" not in engine.engine_init_kwargs,
        f"{_ENGINE}.engine_init_kwargs.speculative_config",
        engine.engine_init_kwargs.get("speculative_config"),
        f"must be set in {_ENGINE}.speculative_config; move it there",
    )
    require_other_engine_args(engine.engine_init_kwargs)
    if engine.speculative_config is not None:
        _check_user_speculation(config, engine.speculative_config)
    speculative = build_speculative_config(config)
    schedule = config.generator.speculation.schedule
    check_schedule(schedule, None if speculative is None else speculative.get("num_speculative_tokens"))
    require(
        schedule in ("fixed", "auto") or speculative is not None,
        SETTING,
        schedule,
        "needs a draft; turn one on (trainer.mtp.enabled, trainer.dflash.enabled), or set it to fixed",
    )
    method = config.generator.speculation.draft_sample_method
    require(
        method == "greedy" or (speculative is not None and speculative.get("method") not in _WITHOUT_DISTRIBUTION),
        "generator.speculation.draft_sample_method",
        method,
        "needs a draft that is a model; set it to greedy, or turn such a draft on (trainer.mtp.enabled, "
        "trainer.dflash.enabled)",
    )
    for setting in SAMPLINGS:
        require_exact_sampling(get_setting(config, setting), speculative, setting)


def _check_user_speculation(config: Config, user: dict[str, Any]) -> None:
    """Checks that the user's speculative_config drafts tokens and agrees with the draft that is trained."""
    num_tokens = user.get("num_speculative_tokens", 1)
    require(
        isinstance(num_tokens, int) and num_tokens >= 1,
        f"{_ENGINE}.speculative_config.num_speculative_tokens",
        num_tokens,
        "must be an integer of at least 1; change it",
    )
    kind = trained_kind(config.trainer)
    if kind is not None:
        kind.check_user_speculation(user)
