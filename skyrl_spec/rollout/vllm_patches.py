"""Changes of vLLM 0.32: one function for each. A fix of a fault has the reason and the condition for its removal.

``register`` is the ``vllm.general_plugins`` entry point. Every process of vLLM calls it before its workers start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from skyrl_spec.rollout.step_times import OFF

WEIGHT_ENGINE = "ray"
# Temperatures below this are greedy, as in vLLM's samplers.
_GREEDY_BELOW = 1e-5

_registered = False


def fix_sampling_parameter_expansion() -> None:
    """Gives every drafted token its request's temperature, top-k and top-p.

    vLLM's CPU version writes them to an int64 copy of the output and drops the copy. Drafted tokens are then sampled
    with uninitialised memory as their temperature.
    Remove when tests/rollout/test_vllm_patches.py::test_sampling_is_wrong_without_the_fix fails.
    """
    from vllm.utils import cpu_triton_utils

    _require(cpu_triton_utils, "_expand_kernel_impl", fix_sampling_parameter_expansion)

    def expand(
        output: Tensor,  # [T] drafted tokens
        input_val: Tensor,  # [B] requests
        cu_num_tokens: Tensor,  # [B] cumulative number of drafted tokens
        replace_from: float,
        replace_to: float,
        MAX_NUM_TOKENS: int | None = None,
    ) -> None:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(input_val == replace_from, replace_to, input_val)
        output.copy_(values.repeat_interleave(counts))

    cpu_triton_utils._expand_kernel_impl = expand


def fix_reload_of_tied_output_weights() -> None:
    """Packs tied output weights again at the end of a weight update.

    On CPU vLLM multiplies with a packed copy of the output weights. A reload writes tied weights through the embeddings
    only, so the copy stays old: the new policy's hidden states are multiplied with the old policy's output weights.
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


def fix_reload_of_experts() -> None:
    """Brings the weights of experts into the form that the kernel reads, after every weight update.

    vLLM does this for the weights that it starts from only. The kernel would take updated ones as if it had been done.
    Remove when tests/rollout/test_vllm_patches.py::test_updated_experts_are_wrong_without_the_fix fails.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    _require(UnquantizedFusedMoEMethod, "_setup_kernel", fix_reload_of_experts)
    upstream = UnquantizedFusedMoEMethod._setup_kernel

    def _setup_kernel(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        is_update = self.moe_kernel is not None
        upstream(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = _setup_kernel  # type: ignore[method-assign]


def fix_context_keys_of_later_layers() -> None:
    """Normalizes the context keys of each layer of a DFlash draft with that layer's weight.

    vLLM normalizes the keys of all layers in one call, with one row of weights for each layer. Its CPU kernel reads
    only the first row, and uses it for every layer.
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
    """Projects the context of a DFlash draft with the layers themselves, not with a fused copy of their weights.

    On CPU a linear layer packs its weights and empties ``weight``. The fused copy is built from ``weight`` before that,
    and cannot be rebuilt after a weight update. Without the copy vLLM calls the layers, as for quantized ones.
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
    """Rebuilds the context buffers of a DFlash draft at the end of a weight update, not in the middle of one.

    The buffers are copies of parameters and references to them. ``load_weights`` builds them. During a weight update,
    layers that wait for tensors and the RoPE table have no values yet, so the next draft fails or uses old weights.
    The new values are written into the existing tensors, because a CUDA graph may point to them.
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
        # Attention layers have kernel_tensors during a weight update, and only then.
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


def keep_tied_heads_tied() -> None:
    """Ties the output head to the embedding where config.json says so, also if the checkpoint stores a head.

    vLLM would load such a head, and tie it only if it is the model's single one. A weight sync sends the embedding
    alone. That the stored head equals it was checked before (``specs.model.require_tied_head``).
    """
    from vllm.config import ModelConfig

    config_class: Any = ModelConfig
    _require(config_class, "maybe_untie_word_embeddings", keep_tied_heads_tied)
    config_class.maybe_untie_word_embeddings = lambda self: None


def fix_rewinding_of_generators() -> None:
    """Restores a request's random state when vLLM discards a token sampled after a partial prefill.

    vLLM moves the generator's offset back, but CPU generators have no offset. The engine fails at the first seeded
    request whose prompt does not fit into one step. The fix saves the state before sampling.
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


def let_a_drafter_be_off() -> None:
    """Lets a scheduler turn the drafter off in a step, with a draft of ``step_times.OFF`` tokens.

    With a draft of 0 tokens vLLM still runs the drafter's first pass, which fills in the draft's keys. Where a draft
    does not pay at all, this pass is a loss.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner_class: Any = GPUModelRunner
    for name in ("propose_draft_token_ids", "_copy_valid_sampled_token_count"):
        _require(runner_class, name, let_a_drafter_be_off)
    upstream = runner_class.propose_draft_token_ids

    def propose_draft_token_ids(self: Any, scheduler_output: Any, sampled_token_ids: Any, *inputs: Any) -> Any:
        if scheduler_output.num_spec_tokens_to_schedule != OFF:
            return upstream(self, scheduler_output, sampled_token_ids, *inputs)
        self._draft_probs = self._draft_prob_req_ids = None
        # The next step of an engine that schedules ahead reads the sampled tokens and their numbers on the GPU.
        if self.valid_sampled_token_count_event is not None:
            self._copy_valid_sampled_token_count(
                *self.drafter.prepare_next_token_ids_padded(
                    sampled_token_ids, self.requests, self.input_batch, self.discard_request_mask.gpu
                )
            )
        return torch.empty(self.input_batch.num_reqs, 0, dtype=torch.int64, device=self.device)

    runner_class.propose_draft_token_ids = propose_draft_token_ids


def sample_plainly_without_drafts() -> None:
    """Samples a step that verifies no drafts as an engine without a draft does.

    vLLM runs its rejection sampler in every step of an engine that has a draft. Without drafted tokens the result is
    the same and takes several times as long, and top-k fails on CPU: it takes a maximum over no rows.
    """
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    sampler_class: Any = RejectionSampler
    _require(sampler_class, "forward", sample_plainly_without_drafts)
    upstream = sampler_class.forward

    def forward(self: Any, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any) -> Any:
        if any(metadata.num_draft_tokens):
            return upstream(self, metadata, draft_probs, logits, sampling_metadata)
        return self.sampler(logits=logits, sampling_metadata=sampling_metadata)

    sampler_class.forward = forward


def let_drafts_follow_the_seed() -> None:
    """Samples drafted tokens (``draft_sample_method=probabilistic``) with the generators of their requests.

    vLLM samples them with the generator of the process. A request's tokens would then depend on all other requests
    before it, seed or not.
    """
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    drafter_class: Any = SpecDecodeBaseProposer
    _require(drafter_class, "_sample_from_logits", let_drafts_follow_the_seed)
    upstream = drafter_class._sample_from_logits

    # [R, V] logits: one row of each request, or, of a draft that drafts all at once, all rows of a request in a row.
    def _sample_from_logits(self: Any, logits: Tensor, metadata: Any) -> tuple[Tensor, Tensor | None]:
        if not self._enable_probabilistic_draft_probs or metadata.all_greedy:
            return upstream(self, logits, metadata)
        num_rows = len(logits) // len(metadata.temperature)
        temperature_R = metadata.temperature.repeat_interleave(num_rows)
        is_greedy_R = temperature_R < _GREEDY_BELOW
        probs = (logits / temperature_R.masked_fill(is_greedy_R, 1.0)[:, None]).softmax(dim=-1, dtype=torch.float32)
        noise = torch.empty_like(probs).exponential_()
        for index, generator in metadata.generators.items():
            noise[index * num_rows :][:num_rows].exponential_(generator=generator)
        sampled_R = (probs / noise).argmax(dim=-1)
        return torch.where(is_greedy_R, probs.argmax(dim=-1), sampled_R), probs

    drafter_class._sample_from_logits = _sample_from_logits


def let_speculation_be_called() -> None:
    """Gives vLLM's engine core a method that calls its ``scheduler.Speculation``, which may be in another process."""
    from vllm.v1.engine.core import EngineCore

    def call_speculation(self: Any, method: str, *args: Any) -> Any:
        return getattr(self.scheduler.speculation, method)(*args)

    core_class: Any = EngineCore
    core_class.call_speculation = call_speculation


def let_experts_be_returned() -> None:
    """Gives vLLM's engine core a method after which a response comes with the experts of its tokens."""
    from vllm.v1.engine.core import EngineCore

    from skyrl_spec.rollout.routed_experts import return_experts

    core_class: Any = EngineCore
    core_class.return_experts = return_experts


def let_requests_be_set_aside() -> None:
    """Gives vLLM's engine core methods that stop all requests for a while, and let them go on.

    vLLM can hold all requests (``pause_scheduler``) or abort them. Here others shall run meanwhile.
    """
    from vllm.v1.core.sched.request_queue import create_request_queue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    def set_aside(self: Any) -> None:
        scheduler = self.scheduler
        # Running requests lose their keys and go to the front of the waiting ones.
        scheduler.reset_prefix_cache(reset_running_requests=True)
        self.requests_aside, scheduler.waiting = scheduler.waiting, create_request_queue(scheduler.policy)

    def take_back(self: Any) -> None:
        # None if this engine was started in place of the one whose requests were set aside.
        if (aside := getattr(self, "requests_aside", None)) is not None:
            self.scheduler.waiting, self.requests_aside = aside, None

    _require(Scheduler, "reset_prefix_cache", let_requests_be_set_aside)
    core_class: Any = EngineCore
    core_class.set_aside, core_class.take_back = set_aside, take_back


def count_steps_by_version() -> None:
    """Adds ``num_steps`` to the spans of a response: how many of the engine's steps sampled each."""
    from vllm.v1.engine.output_processor import RequestState

    state_class: Any = RequestState
    for name in ("track_weight_version", "_weight_version_spans"):
        _require(state_class, name, count_steps_by_version)
    track, spans_of = state_class.track_weight_version, state_class._weight_version_spans

    # Called in every step that sampled something.
    def track_weight_version(self: Any, weight_version: str) -> None:
        track(self, weight_version)
        steps = self.__dict__.setdefault("steps_by_span", [])
        if len(steps) < len(self.weight_version_starts):
            steps.append(0)
        steps[-1] += 1

    def _weight_version_spans(self: Any) -> Any:
        spans = spans_of(self)
        for span, num_steps in zip(spans or [], self.__dict__.get("steps_by_span", []), strict=True):
            span.num_steps = num_steps
        return spans

    state_class.track_weight_version, state_class._weight_version_spans = track_weight_version, _weight_version_spans


FIXES: tuple[Callable[[], None], ...] = (fix_reload_of_context_buffers,)
ADDITIONS: tuple[Callable[[], None], ...] = (
    keep_tied_heads_tied,
    let_a_drafter_be_off,
    sample_plainly_without_drafts,
    let_drafts_follow_the_seed,
    let_speculation_be_called,
    let_experts_be_returned,
    let_requests_be_set_aside,
    count_steps_by_version,
)
CPU_FIXES: tuple[Callable[[], None], ...] = (
    fix_sampling_parameter_expansion,
    fix_reload_of_tied_output_weights,
    fix_reload_of_experts,
    fix_rewinding_of_generators,
    fix_context_keys_of_later_layers,
    fix_context_projection_of_packed_weights,
)


def register(fixes: Sequence[Callable[[], None]] = FIXES, cpu_fixes: Sequence[Callable[[], None]] = CPU_FIXES) -> None:
    """Registers the weight engine with vLLM and applies the fixes. Only the first call in a process has an effect."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    WeightTransferEngineFactory.register_engine(
        WEIGHT_ENGINE, "skyrl_spec.rollout.weight_engine", "RayWeightTransferEngine"
    )
    for change in (*fixes, *(cpu_fixes if current_platform.is_cpu() else ()), *ADDITIONS):
        change()


def _require(owner: Any, name: str, fix: Callable[[], None]) -> None:
    """Raises RuntimeError if the patched name is gone: the fix must then be reviewed. ``owner``: a module or class."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"vLLM no longer has {owner.__name__}.{name}: "
            f"adapt or remove skyrl_spec.rollout.vllm_patches.{fix.__name__}"
        )
