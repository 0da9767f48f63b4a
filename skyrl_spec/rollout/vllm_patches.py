"""What vLLM 0.32 needs to compute what it should: one function for each fault, with its reason and when it can go.

``register`` is the ``vllm.general_plugins`` entry point, so every process of vLLM runs it before its workers start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WEIGHT_ENGINE = "ray"

_registered = False


def fix_sampling_parameter_expansion() -> None:
    """Gives every drafted token its request's temperature, top-k and top-p.

    vLLM's CPU version writes them to an int64 copy of the output and drops the copy, so drafted tokens are sampled
    with uninitialised memory for a temperature.
    Remove when tests/rollout/test_vllm_patches.py::test_sampling_is_wrong_without_the_fix fails.
    """
    from vllm.utils import cpu_triton_utils

    _require(cpu_triton_utils, "_expand_kernel_impl", fix_sampling_parameter_expansion)

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


def fix_top_k_of_no_tokens() -> None:
    """Lets logits without rows pass through top-k.

    vLLM takes the largest k of the rows, and a step in which nothing was drafted has no row of drafted tokens.
    Remove when tests/rollout/test_vllm_patches.py::test_top_k_fails_without_the_fix fails.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    _require(topk_topp_sampler, "apply_top_k_only", fix_top_k_of_no_tokens)
    upstream = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: Tensor, k: Tensor) -> Tensor:
        return upstream(logits, k) if len(logits) else logits

    topk_topp_sampler.apply_top_k_only = apply_top_k_only


def fix_reload_of_tied_output_weights() -> None:
    """Packs output weights that are tied to the embeddings again when a weight update ends.

    On CPU vLLM multiplies with a packed copy of them. A reload loads the tied tensor through the embeddings alone,
    so the copy keeps the old weights: hidden states of the new policy, logits with the output weights of the old.
    Remove when tests/rollout/test_vllm_patches.py::test_tied_output_weights_stay_old_without_the_fix fails.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader import reload

    _require(reload, "finalize_layerwise_reload", fix_reload_of_tied_output_weights)
    upstream = reload.finalize_layerwise_reload

    def finalize_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:
        upstream(model, model_config)
        if model_config.hf_config.tie_word_embeddings:
            for layer in model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)

    reload.finalize_layerwise_reload = finalize_layerwise_reload


def fix_context_keys_of_later_layers() -> None:
    """Norms the context keys of each layer of a DFlash draft with that layer's weight.

    vLLM norms the keys of all layers in one call, with a row of weights for each. Its CPU kernel knows of one row: the
    keys of every layer are normed with the weight of the first.
    Remove when tests/rollout/test_dflash_patches.py::test_context_keys_are_wrong_without_the_fix fails.
    """
    from vllm import _custom_ops
    from vllm.model_executor.models import qwen3_dflash

    draft_class: Any = qwen3_dflash.DFlashQwen3Model
    _require(draft_class, "_normalize_context_k", fix_context_keys_of_later_layers)

    def _normalize_context_k(self: Any, all_k: Tensor) -> Tensor:
        normed = torch.empty_like(all_k)
        for normed_k, k, weight in zip(normed, all_k, self._k_norm_weights, strict=True):
            _custom_ops.rms_norm(normed_k, k, weight, self._rms_norm_eps)
        return normed

    draft_class._normalize_context_k = _normalize_context_k


def fix_context_projection_of_packed_weights() -> None:
    """Projects the context of a DFlash draft with its layers themselves, not with a copy of their weights.

    On CPU a linear layer packs its weights and empties ``weight``. The copy, made of ``weight`` before that, cannot be
    made again when a weight update ends. Without it vLLM asks the layers, as it does with quantized ones.
    Remove when tests/rollout/test_dflash_patches.py::test_an_update_breaks_the_draft_without_the_fix fails for it.
    """
    from vllm.model_executor.models import qwen3_dflash

    draft_class: Any = qwen3_dflash.DFlashQwen3Model
    _require(draft_class, "_build_context_kv_buffers", fix_context_projection_of_packed_weights)
    upstream = draft_class._build_context_kv_buffers

    def _build_context_kv_buffers(self: Any, layers_attn: list[torch.nn.Module], has_bias: bool) -> None:
        upstream(self, layers_attn, has_bias)
        self._fused_kv_weight = self._fused_kv_bias = None

    draft_class._build_context_kv_buffers = _build_context_kv_buffers


def fix_reload_of_context_buffers() -> None:
    """Builds what a DFlash draft projects its context with when a weight update ends, and not in the middle of it.

    These are copies of parameters, and references to some. ``load_weights`` builds them, but in a weight update the
    parameters of layers that wait for tensors, and the RoPE table, are without values then. So the next draft fails or
    is computed with old weights. The new values go into the tensors that are there, which a CUDA graph may point to.
    Remove when tests/rollout/test_dflash_patches.py::test_an_update_breaks_the_draft_without_the_fix fails for it.
    """
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.models import qwen3_dflash

    draft_class: Any = qwen3_dflash.DFlashQwen3Model
    _require(reload, "finalize_layerwise_reload", fix_reload_of_context_buffers)
    _require(draft_class, "_build_fused_kv_buffers", fix_reload_of_context_buffers)
    upstream_finalize = reload.finalize_layerwise_reload
    upstream_build = draft_class._build_fused_kv_buffers

    def _build_fused_kv_buffers(self: Any) -> None:
        # Attention layers keep this from the beginning of an update to its end.
        if all(get_layerwise_info(layer).kernel_tensors is None for layer in self.modules()):
            upstream_build(self)

    @torch.inference_mode()
    def rebuild(draft: torch.nn.Module) -> None:
        tensors = {name: value for name, value in vars(draft).items() if isinstance(value, Tensor)}
        upstream_build(draft)
        for name, tensor in tensors.items():
            built = getattr(draft, name)
            if built is not None and built.shape == tensor.shape:
                setattr(draft, name, tensor.copy_(built))

    def finalize_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:
        upstream_finalize(model, model_config)
        for module in model.modules():
            if isinstance(module, draft_class):
                rebuild(module)

    draft_class._build_fused_kv_buffers = _build_fused_kv_buffers
    reload.finalize_layerwise_reload = finalize_layerwise_reload


def fix_rewinding_of_generators() -> None:
    """Puts a request's random numbers back where a prompt is prefilled in parts, and a sampled token is thrown away.

    vLLM moves the generator's offset back, which a CPU generator does not have: the engine dies of the first seeded
    request whose prompt does not fit into a step. Here the state of before is kept.
    Remove when tests/rollout/test_vllm_patches.py::test_a_prompt_in_parts_fails_without_the_fix fails.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner_class: Any = CPUModelRunner
    for name in ("_sample", "_bookkeeping_sync"):
        _require(runner_class, name, fix_rewinding_of_generators)
    upstream_sample, upstream_bookkeeping = runner_class._sample, runner_class._bookkeeping_sync

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        discarded = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        states = {index: batch.generators[index].get_state() for index in discarded if index in batch.generators}
        output = upstream_sample(self, *args, **kwargs)
        for index, state in states.items():
            batch.generators[index].set_state(state)
        return output

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return upstream_bookkeeping(self, *args, **kwargs)
        finally:
            self.input_batch.generators = generators

    runner_class._sample, runner_class._bookkeeping_sync = _sample, _bookkeeping_sync


FIXES: tuple[Callable[[], None], ...] = (fix_reload_of_context_buffers,)
CPU_FIXES: tuple[Callable[[], None], ...] = (
    fix_sampling_parameter_expansion,
    fix_top_k_of_no_tokens,
    fix_reload_of_tied_output_weights,
    fix_rewinding_of_generators,
    fix_context_keys_of_later_layers,
    fix_context_projection_of_packed_weights,
)


def register(fixes: Sequence[Callable[[], None]] = FIXES, cpu_fixes: Sequence[Callable[[], None]] = CPU_FIXES) -> None:
    """Tells vLLM of the weight engine and applies the fixes. Only a process's first call does anything."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    WeightTransferEngineFactory.register_engine(
        WEIGHT_ENGINE, "skyrl_spec.rollout.weight_engine", "RayWeightTransferEngine"
    )
    for fix in (*fixes, *(cpu_fixes if current_platform.is_cpu() else ())):
        fix()


def _require(owner: Any, name: str, fix: Callable[[], None]) -> None:
    """A fix of something that is gone must be looked at, not skipped. ``owner``: a module or a class."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"{owner.__name__}.{name} is gone from vLLM: adapt or remove skyrl_spec.rollout.vllm_patches.{fix.__name__}"
        )
