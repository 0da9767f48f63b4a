"""vLLM engine arguments that skyrl_spec decides or refuses. Imports no vLLM."""

from __future__ import annotations

from typing import Any

from skyrl_spec.errors import ConfigError

_SETTING = "generator.inference_engine.engine_init_kwargs"
# Arguments that skyrl_spec sets itself.
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
        # Shorthands of vLLM for entries of speculative_config.
        "spec_method",
        "spec_model",
        "spec_tokens",
        "weight_transfer_config",
        "logprobs_mode",
        "disable_log_stats",
        "use_tqdm_on_load",
        "worker_extension_cls",
        "scheduler_cls",
        "additional_config",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "enable_sleep_mode",
    }
)
# The weight transfer numbers an engine's ranks by tensor parallelism alone. It waits for ever if there are other ranks.
_ONE_RANK_ARGS = ("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size", "nnodes")
# Arguments that must keep vLLM's default, by the reason. All defaults are None, False or empty.
_REFUSED_ARGS = {
    "an engine is one data-parallel rank; use generator.inference_engine.num_engines": (
        "data_parallel_rank",
        "data_parallel_start_rank",
        "data_parallel_size_local",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "data_parallel_multi_port_external_lb",
        "enable_elastic_ep",
    ),
    "rollouts must come from the policy's own distribution": (
        "watermark_config",
        "diffusion_config",
        "logits_processors",
    ),
    "its cache keeps keys of old weights after a weight sync": ("kv_transfer_config", "kv_offloading_size"),
}


def require_other_engine_args(engine_init_kwargs: dict[str, Any]) -> None:
    """Checks ``generator.inference_engine.engine_init_kwargs``.

    Raises:
        ConfigError: an argument that another setting decides, that the weight sync cannot serve, or that makes
            rollouts inexact.
    """
    for key in sorted(OWN_ENGINE_ARGS & engine_init_kwargs.keys()):
        raise ConfigError(
            f"{_SETTING}.{key}={engine_init_kwargs[key]!r}: skyrl_spec sets this argument itself; remove it, and use "
            "the setting for it if there is one"
        )
    for key in _ONE_RANK_ARGS:
        if engine_init_kwargs.get(key, 1) != 1:
            raise ConfigError(
                f"{_SETTING}.{key}={engine_init_kwargs[key]!r}: the weight sync reaches tensor-parallel ranks only, so "
                "it must be 1; use generator.inference_engine.tensor_parallel_size or num_engines"
            )
    for reason, keys in _REFUSED_ARGS.items():
        for key in keys:
            value = engine_init_kwargs.get(key)
            # 0 is no default: as a rank it makes vLLM take part in data parallelism.
            if not (value is None or value is False or value in ([], {})):
                raise ConfigError(f"{_SETTING}.{key}={value!r}: {reason}; remove it")
