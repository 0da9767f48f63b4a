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
        "weight_transfer_config",
        "logprobs_mode",
        "disable_log_stats",
        "use_tqdm_on_load",
        "worker_extension_cls",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
    }
)
# The weight transfer numbers the ranks of an engine by tensor parallelism alone: with others it would wait for ever.
_ONE_RANK_ARGS = ("pipeline_parallel_size", "data_parallel_size")


def require_other_engine_args(engine_init_kwargs: dict[str, Any]) -> None:
    """Raises ``ConfigError`` for an argument that another setting decides, or that the weight sync cannot serve."""
    for key in sorted(OWN_ENGINE_ARGS & engine_init_kwargs.keys()):
        raise ConfigError(
            f"{_SETTING}.{key}={engine_init_kwargs[key]!r}: skyrl_spec sets this argument itself; remove it, and use "
            "the setting of its own if there is one"
        )
    for key in _ONE_RANK_ARGS:
        if engine_init_kwargs.get(key, 1) != 1:
            raise ConfigError(
                f"{_SETTING}.{key}={engine_init_kwargs[key]!r}: the weight sync reaches tensor-parallel ranks only, so "
                "it must be 1; use generator.inference_engine.tensor_parallel_size or num_engines"
            )
