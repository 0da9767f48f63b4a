"""What vLLM 0.32 needs to sample right on CPU: one function for each fault, with its reason and when it can go.

``register`` is the ``vllm.general_plugins`` entry point, so every process of vLLM runs it before its workers start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WEIGHT_ENGINE = "ray"

_registered = False


def mend_sampling_parameter_expansion() -> None:
    """Gives every drafted token its request's temperature, top-k and top-p.

    vLLM's CPU version writes them to an int64 copy of the output and drops the copy, so drafted tokens are sampled
    with uninitialised memory for a temperature.
    Remove when tests/rollout/test_vllm_compat.py::test_sampling_is_wrong_without_the_mend fails.
    """
    from vllm.utils import cpu_triton_utils

    _require(cpu_triton_utils, "_expand_kernel_impl", mend_sampling_parameter_expansion)

    def expand(
        output: Tensor,  # [T] drafted tokens
        input_val: Tensor,  # [B] requests
        cu_num_tokens: Tensor,  # [B] drafted tokens of the requests so far
        replace_from: float,
        replace_to: float,
        MAX_NUM_TOKENS: int | None = None,
    ) -> None:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(input_val == replace_from, replace_to, input_val)
        output.copy_(values.repeat_interleave(counts))

    cpu_triton_utils._expand_kernel_impl = expand


def mend_top_k_of_no_tokens() -> None:
    """Lets logits without rows pass through top-k.

    vLLM takes the largest k of the rows, and a step in which nothing was drafted has no row of drafted tokens.
    Remove when tests/rollout/test_vllm_compat.py::test_top_k_fails_without_the_mend fails.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    _require(topk_topp_sampler, "apply_top_k_only", mend_top_k_of_no_tokens)
    upstream = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: Tensor, k: Tensor) -> Tensor:
        return upstream(logits, k) if len(logits) else logits

    topk_topp_sampler.apply_top_k_only = apply_top_k_only


def mend_reload_of_tied_output_weights() -> None:
    """Packs output weights that are tied to the embeddings again when a weight update ends.

    On CPU vLLM multiplies with a packed copy of them. A reload loads the tied tensor through the embeddings alone,
    so the copy keeps the old weights: hidden states of the new policy, logits with the output weights of the old.
    Remove when tests/rollout/test_vllm_compat.py::test_tied_output_weights_stay_old_without_the_mend fails.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader import reload

    _require(reload, "finalize_layerwise_reload", mend_reload_of_tied_output_weights)
    upstream = reload.finalize_layerwise_reload

    def finalize_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:
        upstream(model, model_config)
        if model_config.hf_config.tie_word_embeddings:
            for layer in model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)

    reload.finalize_layerwise_reload = finalize_layerwise_reload


CPU_MENDS: tuple[Callable[[], None], ...] = (
    mend_sampling_parameter_expansion,
    mend_top_k_of_no_tokens,
    mend_reload_of_tied_output_weights,
)


def register(cpu_mends: Sequence[Callable[[], None]] = CPU_MENDS) -> None:
    """Tells vLLM of the weight engine and, on CPU, applies the mends. Only a process's first call does anything."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    WeightTransferEngineFactory.register_engine(
        WEIGHT_ENGINE, "skyrl_spec.rollout.weight_engine", "RayWeightTransferEngine"
    )
    if current_platform.is_cpu():
        for mend in cpu_mends:
            mend()


def _require(module: Any, name: str, mend: Callable[[], None]) -> None:
    """A mend of something that is gone must be looked at, not skipped."""
    if not hasattr(module, name):
        raise RuntimeError(
            f"{module.__name__}.{name} is gone from vLLM: adapt or remove skyrl_spec.rollout.compat.{mend.__name__}"
        )
