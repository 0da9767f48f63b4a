"""The policy: Megatron's GPTModel without MTP. Its forward pass returns hidden states, not logits.

Logits exist only inside the losses, in chunks. The draft is a module outside (``drafts``) and cannot reach the policy's
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from skyrl_spec.models import megatron_patches
from skyrl_spec.models.attention import DocumentAttention, PackedDocuments
from skyrl_spec.models.experts import experts_spec
from skyrl_spec.models.norm import RmsNorm
from skyrl_spec.models.pack import Pack, table_length
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.router_replay import RouterReplay
from skyrl_spec.models.sequence_parallel import padded, whole
from skyrl_spec.settings.derived import uses_sequence_parallel
from skyrl_spec.settings.policy import MegatronConfig
from skyrl_spec.specs.model import ModelSpec, padded_vocab_size
from skyrl_spec.specs.stages import Stages

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LAYERS = "decoder.layers."


def transformer_config(spec: ModelSpec, megatron: MegatronConfig, device: torch.device) -> TransformerConfig:
    """Megatron's configuration of the trunk. Fusions that need Apex or Transformer Engine are off."""
    dtype = DTYPES[megatron.dtype]
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=megatron.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=megatron.num_layers_in_last_pipeline_stage,
        # Packs differ in length. Every stage knows the lengths (``training.pipeline``).
        variable_seq_lengths=megatron.pipeline_model_parallel_size > 1,
        # The only one for packs of any length. Megatron checks it in a model without experts too.
        moe_token_dispatcher_type="alltoall",
        **_experts(spec, megatron),
        # A wait of the host for every tensor, for versions of PyTorch before 2.0.
        batch_p2p_sync=False,
        sequence_parallel=uses_sequence_parallel(megatron, device.type, has_experts=spec.experts is not None),
        use_cpu_initialization=device.type == "cpu",
        # Every weight is read from a checkpoint.
        perform_initialization=False,
        # Token weights carry the global denominator, so Megatron must not divide again.
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        # Compiled by torch.
        bias_activation_fusion=device.type == "cuda",
        bias_dropout_fusion=device.type == "cuda",
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTE[megatron.recompute_granularity](megatron),
    )


def _experts(spec: ModelSpec, megatron: MegatronConfig) -> dict[str, Any]:
    """Megatron's settings of a mixture of experts."""
    if spec.experts is None:
        return {}
    return {
        "num_moe_experts": spec.experts.num,
        "moe_ffn_hidden_size": spec.experts.ffn_hidden_size,
        "moe_router_topk": spec.experts.per_token,
        # A softmax over the chosen experts is one over all experts, divided by the sum of the chosen.
        "moe_router_pre_softmax": not spec.experts.is_normed,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if megatron.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": megatron.moe_aux_loss_coeff,
        "expert_model_parallel_size": megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": megatron.expert_tensor_parallel_size,
    }


# Megatron's settings of each ``recompute_granularity``.
_RECOMPUTE: dict[str | None, Callable[[MegatronConfig], dict[str, Any]]] = {
    None: lambda megatron: {},
    "selective": lambda megatron: {
        "recompute_granularity": "selective",
        # Megatron calls the mlp of a layer with experts moe, and ignores the name that does not apply.
        "recompute_modules": [*megatron.recompute_modules, *(["moe"] if "mlp" in megatron.recompute_modules else [])],
    },
    # Every layer keeps only its input.
    "full": lambda megatron: {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def layer_spec(config: TransformerConfig, core_attention: type[nn.Module] = DocumentAttention) -> ModuleSpec:
    """Megatron's local transformer layer with ``core_attention`` and ``RmsNorm`` in place of its own."""
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    attention = spec.submodules.self_attention
    qk_norms = {"q_layernorm": RmsNorm, "k_layernorm": RmsNorm} if config.qk_layernorm else {}
    return replace(
        spec,
        submodules=replace(
            spec.submodules,
            input_layernorm=RmsNorm,
            pre_mlp_layernorm=RmsNorm,
            mlp=spec.submodules.mlp if config.num_moe_experts is None else experts_spec(),
            self_attention=replace(
                attention, submodules=replace(attention.submodules, core_attention=core_attention, **qk_norms)
            ),
        ),
    )


def draft_config(trunk: TransformerConfig, **changes: Any) -> TransformerConfig:
    """Megatron's configuration of a draft: dense, and whole on one pipeline stage.

    Recompute is off: a draft is a few layers deep. So is sequence parallelism: a share of its rows is few.
    """
    return replace(
        trunk,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
        sequence_parallel=False,
        pipeline_model_parallel_size=1,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        variable_seq_lengths=False,
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        **changes,
    )


class PolicyModel(GPTModel):
    """GPTModel whose forward pass stops before the output layer, or the layers of one pipeline stage."""

    # Of the whole model, that the stages before this one have.
    num_layers_before = 0
    # None: routers choose.
    router_replay: RouterReplay | None = None
    # On the last stage, for a draft: this rank's rows of the first stage's embedding, as of ``refresh_embedding``.
    embedding_copy_vD: Tensor | None = None

    def whole_name(self, name: str) -> str:
        """Name in the whole model of a parameter or module of this stage."""
        if name == "output_layer.weight" and self.share_embeddings_and_output_weights:
            return "embedding.word_embeddings.weight"
        if self.num_layers_before == 0 or not name.startswith(_LAYERS):
            return name
        number, *rest = name.removeprefix(_LAYERS).split(".", 1)
        return ".".join([f"{_LAYERS}{int(number) + self.num_layers_before}", *rest])

    def forward(self, pack: Pack) -> Tensor:
        """Hidden states of this rank's tokens after the final norm, ``[T, D]``, equal on tensor-parallel ranks.

        A stage that is not the last returns what the next one takes over, ``[T, 1, D]``, with a part of the tokens
        under sequence parallelism.
        """
        num_tokens = pack.num_own
        if self.config.sequence_parallel and pack.share is None:
            pack = padded(pack, self.config.tensor_model_parallel_size)
        if self.router_replay is not None:
            recomputed = self.config.recompute_modules if self.config.recompute_granularity == "selective" else ()
            is_computed_again = self.config.recompute_granularity == "full" or "moe" in recomputed
            is_computed_again &= torch.is_grad_enabled()
            self.router_replay.set(self._own_experts(pack), is_computed_again=is_computed_again)
        hidden_T1D = None
        if self.pre_process:
            hidden_T1D = self.embedding(input_ids=pack.own(pack.token_ids_T)[None], position_ids=None)
        rotary = self.rotary_pos_emb(table_length(pack.documents.longest), packed_seq=True)
        hidden_T1D = self.decoder(
            hidden_states=hidden_T1D,
            attention_mask=None,
            rotary_pos_emb=rotary[pack.own(pack.position_T)],
            packed_seq_params=PackedDocuments(documents=pack.documents, share=pack.share),
        )
        if not self.post_process:
            return hidden_T1D
        return whole(hidden_T1D, num_tokens) if self.config.sequence_parallel else hidden_T1D[:, 0]

    def replay_routers(self) -> None:
        """Sends tokens to the experts of their pack from now on, where it has some."""
        routers = [layer.mlp.router for layer in self.decoder.layers]
        self.router_replay = RouterReplay(routers, self.num_layers_before)

    def _own_experts(self, pack: Pack) -> Tensor | None:
        """``experts_TLk`` of the tokens that this rank's routers see."""
        if pack.experts_TLk is None:
            return None
        own_TLk = pack.own(pack.experts_TLk)
        if not self.config.sequence_parallel:
            return own_TLk
        return own_TLk.chunk(self.config.tensor_model_parallel_size)[dist.get_rank(self.pg_collection.tp)]

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding, ``[..., D]``, without gradient. Collective over tensor-parallel ranks.

        Megatron's own module would cut them into parts under sequence parallelism.
        """
        weight_vD, group = self._embedding_vD(), self.pg_collection.tp
        local = token_ids - dist.get_rank(group) * len(weight_vD)
        is_remote = (local < 0) | (local >= len(weight_vD))
        rows = F.embedding(local.masked_fill(is_remote, 0), weight_vD).masked_fill(is_remote[..., None], 0)
        if self.config.tensor_model_parallel_size > 1:
            dist.all_reduce(rows, group=group)
        return rows

    def _embedding_vD(self) -> Tensor:
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        if self.share_embeddings_and_output_weights:
            return self.output_weight_vD()
        assert self.embedding_copy_vD is not None
        return self.embedding_copy_vD

    @torch.no_grad()
    def refresh_embedding(self, parallel: Parallel) -> None:
        """Copies the embedding from the first stage to the last, where drafts read it. Collective over the two."""
        if parallel.ends_group is None or self.share_embeddings_and_output_weights:
            return
        if not self.pre_process and self.embedding_copy_vD is None:
            self.embedding_copy_vD = torch.empty_like(self.output_layer.weight)
        dist.broadcast(self._embedding_vD(), parallel.rank_of_stage(0), group=parallel.ends_group)

    def output_weight_vD(self) -> Tensor:
        """This rank's rows of the output head, which is the embedding if they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_policy(spec: ModelSpec, config: TransformerConfig, parallel: Parallel, stages: Stages) -> PolicyModel:
    """The policy, or this stage of it, on this rank's device, weights not yet loaded."""
    layers = stages.layers(parallel.pp_rank)
    with megatron_patches.megatron_device(parallel.device):
        model = PolicyModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(config)] * len(layers), layer_norm=RmsNorm
            ),
            vocab_size=padded_vocab_size(spec.vocab_size, parallel.tp_size),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=parallel.is_first_stage,
            post_process=parallel.is_last_stage,
            share_embeddings_and_output_weights=spec.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
        )
        model.num_layers_before = layers.start
        # Norms are built in fp32.
        return model.to(parallel.device, config.params_dtype)
