"""Processes, memory and sizes of a run, computed from the shapes of its model. Starts nothing and imports no torch.

Parameters, gradients, optimizer state, checkpoints and KV cache are exact. Activations are an estimate. The memory that
the frameworks need for themselves is not included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from skyrl_spec.drafts.kinds import KINDS, trained_kind
from skyrl_spec.drafts.kinds.kind import DraftShapes
from skyrl_spec.drafts.kinds.offloads import offloads
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.settings.derived import (
    engine_dtype,
    longest_sequence,
    parallel_sizes,
    uses_fp32_head,
    uses_sequence_parallel,
)
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.dtypes import DTYPES
from skyrl_spec.specs.files import Shapes
from skyrl_spec.specs.model import (
    EMBEDDING,
    ROUTER,
    ModelSpec,
    is_of_expert,
    load_spec,
    padded_vocab_size,
    tensor_shapes,
)
from skyrl_spec.specs.stages import Stages

_FP32 = DTYPES["fp32"].num_bytes


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes on a policy worker. ``reference`` is the frozen policy of the KL penalty.

    ``update`` is the temporary memory of AdamW while it updates all parameters at once, as PyTorch does on GPUs.
    Activations are freed by then, so that only the larger of ``update`` and ``activations`` counts.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    update: int

    @property
    def parts(self) -> dict[str, int]:
        """The terms of ``total`` by name."""
        lasting = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "reference": self.reference,
        }
        if self.update > self.activations:
            return lasting | {"update": self.update}
        return lasting | {"activations": self.activations}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Offloaded:
    """Bytes of a worker that leave the device between training steps. Gradients need no copy in host memory."""

    gradients: int
    optimizer: int
    weights: int
    reference: int

    @property
    def total(self) -> int:
        return self.gradients + self.host

    @property
    def host(self) -> int:
        return self.optimizer + self.weights + self.reference


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, except where a field counts tokens."""

    # On the pipeline stage that needs most, and totals of all stages.
    worker: WorkerMemory
    stage_totals: tuple[int, ...]
    offloaded: Offloaded
    # Of policy and draft.
    num_parameters: int
    # Of these, what a token goes through.
    num_active_parameters: int
    trains_policy: bool
    engine_weights: int
    # In the cache of one engine.
    kv_bytes_per_token: int
    checkpoint: int
    # Copies in host memory of a worker, at most, while a checkpoint is written beside training.
    checkpoint_copies: int
    sync: int
    # Upper bound: every prompt and response has its largest length.
    tokens_per_step: int
    # On each GPU of an engine that samples its drafts: their distributions, at most.
    draft_probs: int


def plan_memory(config: Config, *, trains_policy: bool = True) -> MemoryPlan:
    """Sizes of a run whose model and draft exist. ``trains_policy=False``: of a warm-up.

    Raises:
        ConfigError: model or draft cannot be read.
    """
    trainer, engine = config.trainer, config.generator.inference_engine
    spec = load_spec(trainer.policy.model.path, weights=False)
    draft = trained_draft_shapes(config, spec)
    size, engine_size = _weight_bytes(config), DTYPES[engine_dtype(config)].num_bytes
    engine_tp, served = engine.tensor_parallel_size, _served_draft(config, spec)
    policy = _policy_counts(spec, engine_tp)
    num_trained = count(draft) + (policy.all if trains_policy else 0)
    stages = Stages.of(spec.num_layers, trainer.policy.megatron_config)
    workers = [
        _worker_memory(config, spec, draft, stages, stage, trains_policy=trains_policy)
        for stage in range(len(stages.num_layers))
    ]
    fullest = max(range(len(workers)), key=lambda stage: workers[stage].total)
    worker, has_draft = workers[fullest], fullest == stages.last
    num_served = policy.on_rank + policy.experts // engine_tp + count_on_rank(served.tensors, engine_tp)
    kv_values_per_token = 2 * (spec.num_layers + served.num_layers) * spec.num_kv_heads * spec.head_dim
    return MemoryPlan(
        worker=worker,
        stage_totals=tuple(one.total for one in workers),
        offloaded=_offloaded(config, worker, count_on_rank(draft, parallel_sizes(config).tp) if has_draft else 0),
        num_parameters=policy.all + count(draft),
        num_active_parameters=policy.all + count(draft) - _num_idle(spec),
        trains_policy=trains_policy,
        engine_weights=num_served * engine_size,
        kv_bytes_per_token=kv_values_per_token * engine_size // engine_tp,
        checkpoint=num_trained * (size + _optimizer_bytes(size)),
        checkpoint_copies=_checkpoint_copies(config, worker, draft, trains_policy=trains_policy),
        sync=num_trained * size,
        tokens_per_step=_sampled_prompts(config) * config.generator.n_samples_per_prompt * longest_sequence(config),
        draft_probs=_draft_probs(config, spec),
    )


def _draft_probs(config: Config, spec: ModelSpec) -> int:
    """Bytes of two copies (vLLM's ``_draft_probs`` and its rows of a step) of float32 distributions."""
    speculative = build_speculative_config(config)
    if speculative is None or config.generator.speculation.draft_sample_method != "probabilistic":
        return 0
    num_tokens = config.generator.inference_engine.max_num_seqs * int(speculative["num_speculative_tokens"])
    return 2 * num_tokens * spec.vocab_size * _FP32


def _worker_memory(
    config: Config, spec: ModelSpec, draft: Shapes, stages: Stages, stage: int, *, trains_policy: bool
) -> WorkerMemory:
    trainer, size = config.trainer, _weight_bytes(config)
    sizes = parallel_sizes(config)
    tp = sizes.tp
    copied = 0
    if stage != stages.last:
        draft = {}
    elif draft and stage > 0 and not spec.tie_word_embeddings:
        # The draft's copy of the embedding, which the first stage has.
        copied = count_on_rank({EMBEDDING: (spec.vocab_size, spec.hidden_size)}, tp, padded=True)
    policy = _policy_counts(spec, tp, stages, stage)
    of_experts = policy.experts // (sizes.ep * sizes.expert_tp)
    policy_on_rank = policy.on_rank + of_experts
    draft_on_rank = count_on_rank(draft, tp)
    num_trained = draft_on_rank + (policy_on_rank if trains_policy else 0)
    # The distributed optimizer divides a rank's optimizer state over all ranks with the same part of the model.
    num_updated = num_trained
    if trainer.policy.megatron_config.use_distributed_optimizer:
        trained_experts = of_experts if trains_policy else 0
        num_updated = (num_trained - trained_experts) // (sizes.dp * sizes.cp) + trained_experts // sizes.expert_dp
    return WorkerMemory(
        weights=(policy_on_rank + draft_on_rank + copied) * size,
        gradients=num_trained * _FP32,
        optimizer=num_updated * _optimizer_bytes(size),
        reference=policy_on_rank * size if trainer.algorithm.use_kl_loss else 0,
        activations=activations(config, spec, tp, stages, stage),
        update=num_updated * _FP32 if trainer.placement.device == "cuda" else 0,
    )


class _Counts(NamedTuple):
    """Parameters of the policy: all, those of experts, and the others on one tensor-parallel rank."""

    all: int
    experts: int
    on_rank: int


# There are tens of thousands of tensors in a large mixture of experts, and hundreds of layouts.
@lru_cache(maxsize=1024)
def _policy_counts(spec: ModelSpec, tp: int, stages: Stages | None = None, stage: int = 0) -> _Counts:
    """Numbers of parameters of the whole policy, as engines have it, or of a pipeline stage of the trainer."""
    shapes: Shapes = tensor_shapes(spec)
    if stages is not None:
        shapes = _of_stage(shapes, spec, stages, stage)
    experts = sum(math.prod(shape) for name, shape in shapes.items() if is_of_expert(name))
    return _Counts(count(shapes), experts, count_on_rank(shapes, tp, padded=stages is not None))


def _of_stage(shapes: Shapes, spec: ModelSpec, stages: Stages, stage: int) -> Shapes:
    """The policy's tensors on a pipeline stage. The last one has a tied head of its own."""
    kept = {name: shape for name, shape in shapes.items() if stages.of_tensor(name) == stage}
    if spec.tie_word_embeddings and stage == stages.last:
        kept[EMBEDDING] = shapes[EMBEDDING]
    return kept


def _offloaded(config: Config, worker: WorkerMemory, draft_on_rank: int) -> Offloaded:
    """``draft_on_rank``: number of the draft's parameters on a rank. The rest that is trained is the policy's."""
    moved, num_trained = offloads(config), worker.gradients // _FP32
    num_moved = (num_trained - draft_on_rank) * moved.policy_state + draft_on_rank * moved.draft_state
    return Offloaded(
        gradients=num_moved * _FP32,
        optimizer=worker.optimizer * num_moved // max(1, num_trained),
        weights=worker.weights * moved.weights,
        reference=worker.reference * moved.reference,
    )


def _checkpoint_copies(config: Config, worker: WorkerMemory, draft: Shapes, *, trains_policy: bool) -> int:
    """Bytes of what a worker writes: its part of the trained weights and of the optimizer state."""
    if not config.trainer.policy.megatron_config.async_dist_ckpt_save:
        return 0
    tp = parallel_sizes(config).tp
    weights = worker.weights if trains_policy else count_on_rank(draft, tp) * _weight_bytes(config)
    return weights + worker.optimizer


def _weight_bytes(config: Config) -> int:
    """Bytes of a parameter in the trainer."""
    return DTYPES[config.trainer.policy.megatron_config.dtype].num_bytes


def _optimizer_bytes(weight_bytes: int) -> int:
    """Bytes of optimizer state per parameter: Adam's two moments, and an fp32 master copy of a shorter parameter."""
    return 2 * _FP32 + (_FP32 if weight_bytes != _FP32 else 0)


def _sampled_prompts(config: Config) -> int:
    """Largest number of prompts in a step. Dynamic sampling may take several batches."""
    dynamic = config.trainer.algorithm.dynamic_sampling
    return config.trainer.train_batch_size * (1 if dynamic.type is None else dynamic.max_sample_batches)


def trained_draft_shapes(config: Config, spec: ModelSpec) -> Shapes:
    """Shapes of the trained draft. Empty without a draft."""
    kind = trained_kind(config.trainer)
    return {} if kind is None else kind.shapes(config, spec, kind.path(config.trainer), may_be_unwritten=True).tensors


def _served_draft(config: Config, spec: ModelSpec) -> DraftShapes:
    """Shapes of the draft in the engines, trained or not. EAGLE-3 and n-gram drafts count as 0."""
    speculative = build_speculative_config(config) or {}
    kind = KINDS.get(speculative.get("method", ""))
    return (
        DraftShapes({}, 0)
        if kind is None
        else kind.shapes(config, spec, speculative.get("model"), may_be_unwritten=True)
    )


def count(shapes: Shapes) -> int:
    """Number of elements in all tensors."""
    return sum(map(math.prod, shapes.values()))


def count_on_rank(shapes: Shapes, tp: int, *, padded: bool = False) -> int:
    """Number of elements on one tensor-parallel rank. Matrices and biases are divided, norms and routers are not.

    Experts do not count: they are divided in other ways.

    ``padded``: embedding and output head have the rows that the trainer pads them to.
    """
    total = 0
    for name, shape in shapes.items():
        if is_of_expert(name):
            continue
        if padded and name in ("model.embed_tokens.weight", "lm_head.weight"):
            shape = (padded_vocab_size(shape[0], tp), *shape[1:])
        is_cut = (len(shape) > 1 or name.endswith(".bias")) and not name.endswith(ROUTER)
        total += math.prod(shape) // tp if is_cut else math.prod(shape)
    return total


def _num_idle(spec: ModelSpec) -> int:
    """Parameters of the experts that a token does not go to."""
    experts = spec.experts
    if experts is None:
        return 0
    return spec.num_layers * (experts.num - experts.per_token) * 3 * spec.hidden_size * experts.ffn_hidden_size


def activations(config: Config, spec: ModelSpec, tp: int, stages: Stages, stage: int) -> int:
    """Estimated bytes that full micro-batches keep for their backward pass on a stage, and a chunk of logits.

    A stage keeps as many micro-batches as there are stages from it on.
    """
    trainer = config.trainer
    size = _weight_bytes(config)
    megatron = trainer.policy.megatron_config
    tokens = max(trainer.max_tokens_per_microbatch, -(-longest_sequence(config) // megatron.context_parallel_size))
    attention = (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    # A layer: q and k before and after RoPE, v and attention; gate and up together and apart, and their product; two
    # norms with their inputs and outputs. Cosines and sines of RoPE are whole on every rank.
    divided, norms = (5 if spec.qk_norm else 3) * attention // tp, 6 * spec.hidden_size
    rotary = 4 * spec.head_dim
    of_draft_layer = divided + 5 * spec.ffn_hidden_size // tp + norms + rotary
    mlp = _mlp_activations(config, spec)
    # Of the residual stream and the norms, a rank has all tokens or its part.
    is_divided = uses_sequence_parallel(megatron, trainer.placement.device, has_experts=spec.experts is not None)
    parts = tp if is_divided else 1
    per_layer = divided + mlp + norms // parts + rotary
    kept = (stages.last + 1 - stage) * stages.num_layers[stage]
    layers = kept * per_layer
    if megatron.recompute_granularity == "full":
        layers = kept * spec.hidden_size // parts + per_layer
    elif megatron.recompute_granularity == "selective":
        recomputed_norms = 2 * spec.hidden_size // parts * ("layernorm" in megatron.recompute_modules)
        recomputed_mlp = mlp * ("mlp" in megatron.recompute_modules)
        # The layer in the backward pass has everything.
        layers -= (kept - 1) * (recomputed_norms + recomputed_mlp)
    if stage != stages.last:
        return tokens * layers * size
    kind = trained_kind(trainer)
    draft_tokens = 0 if kind is None else kind.training_layer_tokens(config, spec, tokens)
    # The logits of a chunk, their softmax and their gradient.
    logits = 3 * trainer.logprobs_chunk_size * (spec.vocab_size // tp) * _FP32
    if size != _FP32 and trainer.placement.device == "cpu" and uses_fp32_head(config):
        # The float32 copy of the output head (``ChunkLogits``).
        logits += spec.vocab_size // tp * spec.hidden_size * _FP32
    return (tokens * layers + draft_tokens * of_draft_layer) * size + logits


def _mlp_activations(config: Config, spec: ModelSpec) -> int:
    """Values that a layer's feed-forward part keeps for each token. Experts: if all have as many tokens."""
    sizes, experts = parallel_sizes(config), spec.experts
    if experts is None:
        return 5 * spec.ffn_hidden_size // sizes.tp
    # A copy of the token for each of its experts: sent, received and sorted; what the expert computes; its output,
    # sorted and sent back. Weights of all experts and who is chosen, in fp32.
    copies = experts.per_token * (6 * spec.hidden_size * sizes.expert_tp + 5 * experts.ffn_hidden_size)
    return (copies + 4 * experts.num) // sizes.tp
