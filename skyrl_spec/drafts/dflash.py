"""The DFlash block-diffusion draft, built from Megatron's tensor-parallel layers.

One forward pass drafts a block ``[x_a, MASK x K]`` at positions a to a+K. Every slot sees its whole block, and the
policy's hidden states before a as *context*:

- The outputs of some policy layers are concatenated, projected to one width (``fc``) and normed (``hidden_norm``).
- All draft layers share this context. Each applies its own key and value weights to it, without ``input_layernorm``.
- The draft ends in ``norm``. Embedding and output head are those of the current policy.

vLLM serves it with ``model_executor/models/qwen3_dflash.py``.

Source: "DFlash: Block Diffusion for Flash Speculative Decoding", arXiv 2602.06036.

Shapes: S sequence, B batch, D hidden, E captured layers x D, Q slots, H and G query and key heads of this rank, d head
size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from skyrl_spec.drafts.align import expected_acceptance
from skyrl_spec.drafts.base import BatchTokens, Draft, DraftSums, Supervision, Teacher
from skyrl_spec.drafts.block_attention import BlockAttention, block_attention
from skyrl_spec.drafts.blocks import Blocks, draw_blocks, position_weights
from skyrl_spec.losses.soft_ce import vocab_parallel_soft_ce
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.capture import CapturePoint
from skyrl_spec.models.conversion import dflash_rules
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.settings.draft import DflashConfig
from skyrl_spec.specs.dflash import DflashSpec, decay_gamma, dflash_hf_config, read_dflash_spec
from skyrl_spec.specs.model import ModelSpec

_ANCHORS = "anchors"


@dataclass(frozen=True)
class DflashSupervision(Supervision):
    """Blocks that are drawn for a micro-batch."""

    blocks: Blocks


class DflashDraft(Draft):
    """DFlash draft, trained on random blocks of the responses."""

    def __init__(
        self,
        config: DflashConfig,
        target: ModelSpec,
        trunk: TransformerConfig,
        parallel: Parallel,
        temperature: float,
        seed: int,
    ):
        assert config.path is not None, "a draft from scratch is written to a directory first"
        self.config, self.parallel, self.temperature = config, parallel, temperature
        self.spec = read_dflash_spec(config.path)
        self.source = self.spec.layers.path
        # Blocks are as long in training as in an engine.
        self.num_positions = config.num_speculative_tokens or self.spec.block_size - 1
        self.vocab_size = target.vocab_size
        self.module = build_dflash(self.spec, trunk, parallel)
        self.rules = dflash_rules(self.spec.layers)
        self.capture_points = tuple(
            CapturePoint(f"decoder.layers.{layer}", "output") for layer in self.spec.target_layer_ids
        )
        # A generator of its own leaves all other random numbers alone. Tensor-parallel ranks draw the same anchors.
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + parallel.dp_rank)
        gamma = decay_gamma(config, self.num_positions + 1)
        self._weights_K = position_weights(self.num_positions, gamma, parallel.device)

    def supervise(self, targets: BatchTokens) -> DflashSupervision:
        blocks = draw_blocks(
            targets.loss_mask,
            targets.segment_ids,
            self.config.anchors_per_sequence,
            self.num_positions,
            self.generator,
        )
        return DflashSupervision(targets, (blocks.supervised_BAK * self._weights_K).sum(dtype=torch.float64), blocks)

    def forward(self, captured: dict[CapturePoint, Tensor], teacher: Teacher, supervision: DflashSupervision) -> Tensor:
        """Output of the draft at every slot, ``[Q, B, D]``, for the output head."""
        context_SBE = torch.cat([captured[point] for point in self.capture_points], dim=-1)
        return self.module(
            context_SBE,
            self._slot_embeddings(teacher, supervision),
            supervision.blocks.positions_BQ().t(),
            block_attention(supervision.blocks, supervision.targets.segment_ids),
            # The last block may reach beyond the row.
            num_positions=len(context_SBE) + self.num_positions,
        )

    def propose(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, targets: BatchTokens, anchor_B: Tensor
    ) -> Tensor:
        supervised_BAK = torch.ones(len(anchor_B), 1, self.num_positions, dtype=torch.bool, device=anchor_B.device)
        supervision = DflashSupervision(
            targets, supervised_BAK.sum().double(), Blocks(anchor_B[:, None], supervised_BAK)
        )
        return self.forward(captured, teacher, supervision)[1:].transpose(0, 1)

    def loss(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, supervision: Supervision, denominator: Tensor
    ) -> tuple[Tensor, DraftSums]:
        assert isinstance(supervision, DflashSupervision)
        out_QBD = self.forward(captured, teacher, supervision)
        mask_BAK = supervision.blocks.supervised_BAK
        # T supervised tokens and their target positions.
        batch_T, block_T, slot_T = mask_BAK.nonzero(as_tuple=True)
        target_T = supervision.blocks.anchor_BA[batch_T, block_T] + slot_T
        # Any supervision includes a slot 1, whose weight is 1, so the clamp changes only a denominator of 0.
        weights_T = self._weights_K[slot_T] / denominator.clamp(min=1.0)
        labels_T = supervision.targets.token_ids[batch_T, target_T + 1]
        result = vocab_parallel_soft_ce(
            out_QBD[block_T * supervision.blocks.num_slots + slot_T + 1, batch_T][None],
            teacher.hidden_SBD[target_T, batch_T],
            teacher.output_weight_vD,
            weights_T.to(torch.float32)[None],
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            chunk_size=self.config.loss_chunk_size,
            group=self.parallel.tp_group,
            loss_type=self.config.loss_type,
            topk=self.config.loss_topk,
            labels_T=labels_T,
            fp32_logits=self.fp32_logits,
        )
        index_T = (slot_T, batch_T, block_T)
        top1_KBA, hit_KBA = mask_BAK.new_zeros((2, mask_BAK.shape[2], *mask_BAK.shape[:2]))
        accept_prob_KBA = torch.zeros(top1_KBA.shape, dtype=torch.float64, device=mask_BAK.device)
        accept_prob_KBA[index_T] = result.accept_prob_KT[0].double()
        top1_KBA[index_T], hit_KBA[index_T] = result.top1_KT[0], result.argmax_KT[0] == labels_T
        # A block whose last slot is supervised is supervised throughout.
        is_complete_BA = mask_BAK[..., -1]
        sums = DraftSums(
            loss=result.loss.detach().double(),
            top1_agreements_K=top1_KBA.sum(dim=(1, 2)).double(),
            num_targets_K=mask_BAK.sum(dim=(0, 1)).double(),
            accepted_K=expected_acceptance(accept_prob_KBA, hit_KBA)[:, is_complete_BA].sum(dim=1),
            num_chains=is_complete_BA.sum().double(),
        )
        return result.loss, sums

    def random_state(self) -> dict[str, Tensor]:
        return {_ANCHORS: self.generator.get_state()}

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        if _ANCHORS in state:
            self.generator.set_state(state[_ANCHORS])

    def hf_config(self, dtype: torch.dtype) -> dict[str, Any]:
        return dflash_hf_config(self.spec, str(dtype).removeprefix("torch."), self.config.export_rope_scaling)

    def _slot_embeddings(self, teacher: Teacher, supervision: DflashSupervision) -> Tensor:
        """Embeddings of the slots, ``[Q, B, D]``: in each block the anchor's token, then mask tokens."""
        blocks = supervision.blocks
        anchor_ids_BA = supervision.targets.token_ids.gather(1, blocks.anchor_BA)
        mask_id = anchor_ids_BA.new_tensor([self.spec.mask_token_id])
        rows = teacher.embed(torch.cat([anchor_ids_BA.flatten(), mask_id]))
        num_rows, num_anchors = anchor_ids_BA.shape
        slots_BAsD = rows[-1].expand(num_rows, num_anchors, blocks.num_slots, -1).clone()
        slots_BAsD[:, :, 0] = rows[:-1].view(num_rows, num_anchors, -1)
        return slots_BAsD.flatten(1, 2).transpose(0, 1)


class DflashAttention(MegatronModule):
    """Attention of slots over context and slots. Both use the same key and value weights."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        heads, groups, self.head_dim = config.num_attention_heads, config.num_query_groups, config.kv_channels
        options: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": False}
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size, (heads + 2 * groups) * self.head_dim, gather_output=False, **options
        )
        self.linear_proj = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, input_is_parallel=True, skip_bias_add=True, **options
        )
        # Megatron finds these norms by name and sums their gradients over tensor-parallel ranks, whose heads differ.
        self.q_layernorm = WrappedTorchNorm(config, self.head_dim, config.layernorm_epsilon)
        self.k_layernorm = WrappedTorchNorm(config, self.head_dim, config.layernorm_epsilon)
        self.queries_per_group = heads // groups

    def forward(
        self,
        hidden_QBD: Tensor,
        context_SBD: Tensor,
        rotary_Q: Tensor,
        rotary_S: Tensor,
        attend: BlockAttention,
    ) -> Tensor:
        """Output ``[Q, B, D]``. The gradient of ``context_SBD`` is this rank's part of the sum."""
        query_QBHd, key_QBGd, value_QBGd = self._split(self.linear_qkv(hidden_QBD)[0], self.queries_per_group)
        _, key_SBGd, value_SBGd = self._split(nn.functional.linear(context_SBD, self._key_value_weight()), 0)
        query_QBHd = self._rotate(self.q_layernorm(query_QBHd), rotary_Q)
        key_QBGd = self._rotate(self.k_layernorm(key_QBGd), rotary_Q)
        key_SBGd = self._rotate(self.k_layernorm(key_SBGd), rotary_S)
        out_BHQd = attend(
            query_QBHd.permute(1, 2, 0, 3),
            torch.cat([key_SBGd, key_QBGd]).permute(1, 2, 0, 3),
            torch.cat([value_SBGd, value_QBGd]).permute(1, 2, 0, 3),
            self.head_dim**-0.5,
        )
        return self.linear_proj(out_BHQd.permute(2, 0, 1, 3).flatten(2))[0]

    def _split(self, projected: Tensor, queries_per_group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``[.., B, heads, d]`` from Megatron's layout: a group's queries, its key, its value."""
        grouped = projected.unflatten(-1, (-1, queries_per_group + 2, self.head_dim))
        query, key, value = grouped.split([queries_per_group, 1, 1], dim=-2)
        return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)

    def _key_value_weight(self) -> Tensor:
        """Rows of ``linear_qkv`` that produce keys and values, ``[2 G d, D]``."""
        weight = self.linear_qkv.weight
        grouped = weight.view(-1, self.queries_per_group + 2, self.head_dim, weight.shape[1])
        return grouped[:, self.queries_per_group :].reshape(-1, weight.shape[1])

    def _rotate(self, x: Tensor, rotary: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, rotary, config=self.config)


class DflashLayer(MegatronModule):
    """Pre-norm attention and SwiGLU. Parameters have the names of Megatron's transformer layer."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.input_layernorm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = DflashAttention(config)
        self.pre_mlp_layernorm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
        )

    def forward(self, hidden_QBD: Tensor, *attention_inputs: Any) -> Tensor:
        """Output ``[Q, B, D]``. ``attention_inputs`` are those of ``DflashAttention``."""
        hidden_QBD = hidden_QBD + self.self_attention(self.input_layernorm(hidden_QBD), *attention_inputs)
        return hidden_QBD + self.mlp(self.pre_mlp_layernorm(hidden_QBD))[0]


class DflashModule(MegatronModule):
    """Parameters of the draft, and its forward pass from captured states and slot embeddings."""

    def __init__(self, config: TransformerConfig, num_captured: int, rotary: RotaryEmbedding):
        super().__init__(config)
        self.fc = ColumnParallelLinear(
            num_captured * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=True,
        )
        self.hidden_norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.layers = nn.ModuleList([DflashLayer(config) for _ in range(config.num_layers)])
        self.norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        self._rotary = rotary

    def forward(
        self,
        context_SBE: Tensor,
        slots_QBD: Tensor,
        positions_QB: Tensor,
        attend: BlockAttention,
        *,
        num_positions: int,
    ) -> Tensor:
        """Output of every slot after the final norm, ``[Q, B, D]``."""
        context_SBD = self.hidden_norm(self.fc(context_SBE)[0])
        # Layers apply this rank's weights to the context. Its gradient is summed over ranks once, for all layers.
        context_SBD = copy_to_tensor_model_parallel_region(context_SBD)
        rotary = self._rotary(num_positions)
        rotary_Q, rotary_S = rotary[positions_QB, 0], rotary[: len(context_SBE)]
        hidden_QBD = slots_QBD
        for layer in self.layers:
            hidden_QBD = layer(hidden_QBD, context_SBD, rotary_Q, rotary_S, attend)
        return self.norm(hidden_QBD)


def build_dflash(spec: DflashSpec, trunk: TransformerConfig, parallel: Parallel) -> DflashModule:
    """The draft's module on this rank's device, weights not yet loaded.

    Recompute is off: the draft is a few layers deep.
    """
    layers = spec.layers
    config = replace(
        trunk,
        num_layers=layers.num_layers,
        ffn_hidden_size=layers.ffn_hidden_size,
        num_attention_heads=layers.num_heads,
        num_query_groups=layers.num_kv_heads,
        kv_channels=layers.head_dim,
        layernorm_epsilon=layers.rms_norm_eps,
        add_qkv_bias=False,
        qk_layernorm=True,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
    )
    with megatron_patches.megatron_device(parallel.device):
        rotary = RotaryEmbedding(
            layers.head_dim,
            rotary_percent=1.0,
            rotary_base=layers.rope_theta,
            use_cpu_initialization=parallel.device.type == "cpu",
        )
        module = DflashModule(config, len(spec.target_layer_ids), rotary)
        return module.to(parallel.device, config.params_dtype)
