"""Which speculative decoding the engines run. Imports no vLLM: it is decided before any process starts."""

from __future__ import annotations

from typing import Any

from skyrl_spec.config import ConfigError, SamplingConfig, TrainerConfig

_SETTING = "generator.inference_engine.speculative_config"
# Arguments of vLLM's engine that are set here, and so not in engine_init_kwargs.
OWN_ENGINE_ARGS = frozenset(
    {
        "model",
        "dtype",
        "tensor_parallel_size",
        "max_model_len",
        "max_num_seqs",
        "enable_prefix_caching",
        "enforce_eager",
        "seed",
        "speculative_config",
        "weight_transfer_config",
        "logprobs_mode",
        "disable_log_stats",
        "use_tqdm_on_load",
        "worker_extension_cls",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
    }
)

# Settings of vLLM's SpeculativeConfig that decide whether rollouts come from the policy's own distribution, and the
# values that keep it exact. "block" verification is exact on paper, but vLLM's V1 sampler, used on CPU, ignores it.
# Adaptive verification drops drafted tokens by how likely the draft finds them, which biases what is kept.
_EXACT_VALUES: dict[str, tuple[Any, ...]] = {
    "rejection_sample_method": ("standard",),
    "synthetic_acceptance_rates": (None,),
    "synthetic_acceptance_length": (None,),
    "enable_adaptive_verification": (False,),
}


def build_speculative_config(trainer: TrainerConfig, user: dict[str, Any] | None) -> dict[str, Any] | None:
    """vLLM's ``speculative_config``: the user's as it is, else that of the draft that is trained, else None.

    A DFlash draft's directory and number of tokens are added to the user's: ``trainer.dflash`` decides them.
    Raises ``ConfigError`` if the user's is not exact.
    """
    require_exact_rejection(user)
    if trainer.dflash.enabled:
        dflash = trainer.dflash
        decided = {"model": dflash.path, "num_speculative_tokens": dflash.num_speculative_tokens}
        return (user or {"method": "dflash"}) | decided
    if user is None and trainer.mtp.enabled:
        return {"method": "mtp", "num_speculative_tokens": trainer.mtp.num_speculative_tokens}
    return user


def require_other_engine_args(engine_init_kwargs: dict[str, Any]) -> None:
    """Raises ``ConfigError`` for an entry that another setting decides."""
    for key in sorted(OWN_ENGINE_ARGS & engine_init_kwargs.keys()):
        raise ConfigError(
            f"generator.inference_engine.engine_init_kwargs.{key}={engine_init_kwargs[key]!r}: skyrl_spec sets this "
            "argument itself; remove it, and use the setting of its own if there is one"
        )


def require_exact_rejection(speculative_config: dict[str, Any] | None) -> None:
    """Raises ``ConfigError`` unless drafted tokens go through exact rejection sampling."""
    for key, allowed in _EXACT_VALUES.items():
        if speculative_config and key in speculative_config and speculative_config[key] not in allowed:
            raise ConfigError(
                f"{_SETTING}.{key}={speculative_config[key]!r}: rollouts must come from the policy's own distribution,"
                f" so only {allowed[0]!r} is allowed; remove the key"
            )


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
    """Drafts that an engine wants room for behind a sequence, else it stops drafting for its whole batch.

    The one being verified, and the next. On GPUs vLLM schedules a step before it knows what the last one accepted, and
    takes all of it for accepted: one more.
    """
    return 2 if device == "cpu" else 3
