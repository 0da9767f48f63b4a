"""The DFlash block-diffusion draft, built from Megatron's tensor-parallel layers.

One forward pass drafts a block ``[x_a, MASK x K]`` at positions a to a+K. Every slot sees its whole block, and the
policy's hidden states before a as *context*:

- The outputs of some policy layers are concatenated, projected to one width (``fc``) and normed (``hidden_norm``).
- All draft layers share this context. Each applies its own key and value weights to it, without ``input_layernorm``.
- The draft ends in ``norm``. Embedding and output head are those of the current policy.

vLLM serves it with ``model_executor/models/qwen3_dflash.py``.

Source: "DFlash: Block Diffusion for Flash Speculative Decoding", arXiv 2602.06036.

Shapes: T tokens of a pack, D hidden, E captured layers x D, A blocks, K drafted slots of a block, Q = A (K + 1) slots,
H and G query and key heads of this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from skyrl_spec.drafts.align import expected_acceptance
from skyrl_spec.drafts.base import Draft, DraftSums, RolloutSampling, Supervision, Teacher
from skyrl_spec.drafts.block_attention import BlockAttention, Keys, block_attention
from skyrl_spec.drafts.blocks import (
    Blocks,
    blocks_at,
    draw_anchors,
    is_anchor,
    position_weights,
    supervised_blocks,
)
from skyrl_spec.drafts.shares import StepRandom, draw_numbers
from skyrl_spec.losses.draft_loss import draft_loss
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.attention import key_value_rows
from skyrl_spec.models.capture import CapturePoint, layer_output
from skyrl_spec.models.context_parallel import Reach, gathered, sum_over_ranks
from skyrl_spec.models.conversion import dflash_rules
from skyrl_spec.models.norm import RmsNorm
from skyrl_spec.models.pack import Pack, first_tokens, table_length
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.policy import draft_config
from skyrl_spec.models.upload import upload
from skyrl_spec.settings.draft import DflashConfig
from skyrl_spec.specs.dflash import DflashSpec, decay_gamma, read_dflash_spec
from skyrl_spec.specs.model import ModelSpec


@dataclass(frozen=True)
class DflashSupervision(Supervision):
    """Blocks of this rank that are drawn for a pack. N supervised slots."""

    # What the blocks need of the pack, and the index of these tokens in it. Indices in ``blocks`` are those of this.
    read: Pack
    token_S: Tensor
    blocks: Blocks
    # Rows of the teacher's states that the slots read.
    reach: Reach
    # Block of each supervised slot, its index among the drafted ones, its target position in the whole pack and the
    # token behind it.
    block_N: Tensor
    slot_N: Tensor
    position_N: Tensor
    label_N: Tensor
    # Weight of each in the loss.
    weight_N: Tensor
    # Drafted tokens that are accepted this probably are taken as accepted (``Draft.chances``).
    chance_N: Tensor


class DflashDraft(Draft):
    """DFlash draft, trained on random blocks of the responses."""

    def __init__(
        self,
        config: DflashConfig,
        target: ModelSpec,
        trunk: TransformerConfig,
        parallel: Parallel,
        sampling: RolloutSampling,
        seed: int,
        max_slots: int,
    ):
        assert config.path is not None, "a draft from scratch is written to a directory first"
        self.config, self.parallel, self.sampling = config, parallel, sampling
        self.spec = read_dflash_spec(config.path)
        self.source = self.spec.layers.path
        # Blocks are as long in training as in an engine.
        self.num_positions = config.num_speculative_tokens or self.spec.block_size - 1
        self.vocab_size = target.vocab_size
        self.module = build_dflash(self.spec, trunk, parallel)
        self.rules = dflash_rules(self.spec.layers)
        self.capture_points = tuple(map(layer_output, self.spec.target_layer_ids))
        self.random = StepRandom(seed)
        # Largest number of slots in a forward pass. A single block may have more.
        self.max_slots = max_slots
        self._weights_K = position_weights(self.num_positions, decay_gamma(config, self.num_positions + 1))

    def begin_step(self, loss_mask_BS: np.ndarray) -> None:
        num_B = np.minimum(is_anchor(loss_mask_BS).sum(axis=1), self.config.anchors_per_sequence)
        self._num_anchors_B = draw_numbers(num_B, self.config.positions_per_step, self.random.next_step())

    def supervise(self, pack: Pack, rows: Sequence[int]) -> tuple[DflashSupervision, ...]:
        seeds = [self.random.seed_of(row) for row in rows]
        anchors = draw_anchors(pack, seeds, self._num_anchors_B[list(rows)].tolist())
        # Short documents may have more slots than tokens, so that a pack may need several passes.
        at_a_time = max(self.max_slots // (self.num_positions + 1), 1)
        anchor_A = np.asarray(anchors, np.int64)
        own, most = anchor_A[pack.owned(anchor_A)].tolist(), len(anchors)
        if pack.share is not None:
            most = int(np.bincount(pack.share.owners(anchor_A), minlength=1).max())
        parts = [own[first : first + at_a_time] for first in range(0, most, at_a_time)]
        chance_KT = self.chances(pack, rows)
        return tuple(self._supervise_blocks(pack, part, chance_KT) for part in parts)

    def _supervise_blocks(self, pack: Pack, anchors: Sequence[int], chance_KT: Tensor) -> DflashSupervision:
        """Supervision of these blocks, or of none: a rank needs a block to take part in the exchange of context."""
        some = anchors or [0]
        token_S, read = first_tokens(pack, self._read(pack, some))
        blocks = supervised_blocks(np.searchsorted(token_S.numpy(), some).tolist(), read, self.num_positions)
        if not anchors:
            blocks = replace(blocks, supervised_AK=torch.zeros_like(blocks.supervised_AK))
        block_N, slot_N = blocks.supervised_AK.nonzero(as_tuple=True)
        position_N = token_S[blocks.anchor_A[block_N] + slot_N]
        weight_N = self._weights_K[slot_N]
        return DflashSupervision(
            weight=float(weight_N.sum(dtype=torch.float64)),
            read=read,
            token_S=token_S,
            blocks=blocks,
            reach=Reach.of(pack, self.num_positions),
            block_N=block_N,
            slot_N=slot_N,
            position_N=position_N,
            label_N=pack.token_ids_T[position_N + 1],
            weight_N=weight_N,
            chance_N=chance_KT[slot_N, position_N],
        )

    def _read(self, pack: Pack, anchors: Sequence[int]) -> list[int]:
        """Tokens of each document that blocks at these ascending anchors read, from its first."""
        starts_N = np.asarray(pack.documents.starts)
        document_A = np.searchsorted(starts_N, anchors, side="right") - 1
        counts_N = np.zeros(len(starts_N) - 1, np.int64)
        # The last anchor of a document comes last.
        counts_N[document_A] = np.asarray(anchors) + self.num_positions + 1 - starts_N[document_A]
        return np.minimum(counts_N, np.diff(starts_N)).tolist()

    def forward(self, context_TD: Tensor, teacher: Teacher, pack: Pack, blocks: Blocks) -> Tensor:
        """Output of the draft at every slot, ``[Q, D]``, for the output head.

        Args:
            context_TD: ``context`` of all tokens of ``pack``.
        """
        return self.module(
            context_TD,
            self._slot_embeddings(teacher, pack, blocks),
            pack.position_T,
            blocks.position_Q(),
            block_attention(blocks, len(pack.token_ids_T)),
            # The last block may reach beyond its document.
            num_positions=table_length(pack.documents.longest + self.num_positions),
        )

    def context(self, captured: dict[CapturePoint, Tensor], pack: Pack, token_S: Tensor) -> Tensor:
        """Context of these tokens of ``pack``, ``[S, D]``. Collective over ranks that share the pack."""
        if pack.share is None:
            return self.module.context([captured[point][token_S] for point in self.capture_points])
        own_tD = self.module.context([captured[point] for point in self.capture_points])
        return gathered(own_tD, pack.share)[token_S]

    def propose(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, pack: Pack, anchors: Sequence[int]
    ) -> Tensor:
        own_A, device = pack.owned(np.asarray(anchors)), pack.token_ids_T.device
        own = [anchors[index] for index in own_A.tolist()] or [0]
        blocks = blocks_at(own, pack, torch.ones(len(own), self.num_positions, dtype=torch.bool))
        context_TD = self.context(captured, pack, torch.arange(len(pack.token_ids_T), device=device))
        out_QD = self.forward(context_TD, teacher, pack, upload(blocks, device))
        out_AKD = out_QD.unflatten(0, (len(own), -1))[:, 1:]
        proposed_AKD = out_AKD.new_zeros(len(anchors), *out_AKD.shape[1:])
        proposed_AKD[torch.from_numpy(own_A)] = out_AKD[: len(own_A)]
        return sum_over_ranks(proposed_AKD, pack.share)

    def loss(
        self,
        captured: dict[CapturePoint, Tensor],
        teacher: Teacher,
        pack: Pack,
        supervision: Supervision,
        denominator: Tensor,
    ) -> tuple[Tensor, DraftSums]:
        assert isinstance(supervision, DflashSupervision)
        blocks, block_N, slot_N = supervision.blocks, supervision.block_N, supervision.slot_N
        context_SD = self.context(captured, pack, supervision.token_S)
        out_QD = self.forward(context_SD, teacher, supervision.read, blocks)
        # Any supervision includes a slot 1, whose weight is 1, so the clamp changes only a denominator of 0.
        weights_N = (supervision.weight_N / denominator.clamp(min=1.0)).to(torch.float32)
        mask_KA = blocks.supervised_AK.t()
        num_depths, num_blocks = mask_KA.shape
        loss, result = draft_loss(
            self.config.loss_type,
            out_QD[block_N * blocks.num_slots + slot_N + 1][None],
            supervision.reach.rows(teacher.hidden_TD, pack.share)[supervision.reach.row_P[supervision.position_N]],
            teacher.output_weight_vD,
            weights_N[None],
            (slot_N * num_blocks + block_N)[None],
            (num_depths, num_blocks),
            vocab_size=self.vocab_size,
            **self.sampling._asdict(),
            chunk_size=self.config.loss_chunk_size,
            group=self.parallel.tp_group,
            topk=self.config.loss_topk,
            labels_T=supervision.label_N,
            fp32_logits=self.fp32_logits,
        )
        top1_KA, hit_KA = mask_KA.new_zeros((2, *mask_KA.shape))
        accept_prob_KA = torch.zeros(mask_KA.shape, dtype=torch.float64, device=mask_KA.device)
        accept_prob_KA[slot_N, block_N] = result.accept_prob_KT[0].double()
        top1_KA[slot_N, block_N] = result.top1_KT[0]
        hit_KA[slot_N, block_N] = result.accept_label_KT[0] > supervision.chance_N
        # A block whose last slot is supervised is supervised throughout.
        is_complete_A = mask_KA[-1]
        sums = DraftSums(
            loss=loss.detach().double(),
            top1_agreements_K=top1_KA.sum(dim=1).double(),
            num_targets_K=mask_KA.sum(dim=1).double(),
            accepted_K=(expected_acceptance(accept_prob_KA, hit_KA) * is_complete_A).sum(dim=1),
            num_chains=is_complete_A.sum().double(),
        )
        return loss, sums

    def _slot_embeddings(self, teacher: Teacher, pack: Pack, blocks: Blocks) -> Tensor:
        """Embeddings of the slots, ``[Q, D]``: in each block the anchor's token, then mask tokens."""
        anchor_ids_A = pack.token_ids_T[blocks.anchor_A]
        rows = teacher.embed(torch.cat([anchor_ids_A, anchor_ids_A.new_full((1,), self.spec.mask_token_id)]))
        slots_AsD = rows[-1].expand(len(anchor_ids_A), blocks.num_slots, -1).clone()
        slots_AsD[:, 0] = rows[:-1]
        return slots_AsD.flatten(0, 1)


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
        self.q_layernorm = RmsNorm(config, self.head_dim, config.layernorm_epsilon)
        self.k_layernorm = RmsNorm(config, self.head_dim, config.layernorm_epsilon)
        self.queries_per_group = heads // groups

    def forward(
        self,
        hidden_QD: Tensor,
        context_TD: Tensor,
        rotary_Q: Tensor,
        rotary_T: Tensor,
        attend: BlockAttention,
    ) -> Tensor:
        """Output ``[Q, D]``. The gradient of ``context_TD`` is this rank's part of the sum."""
        query_QHd, key_QGd, value_QGd = self._split(self.linear_qkv(hidden_QD)[0], self.queries_per_group)
        key_value_weight = key_value_rows(self.linear_qkv.weight, self.queries_per_group, self.head_dim)
        _, key_TGd, value_TGd = self._split(nn.functional.linear(context_TD, key_value_weight), 0)
        query_QHd = self._rotate(self.q_layernorm(query_QHd), rotary_Q)
        key_QGd = self._rotate(self.k_layernorm(key_QGd), rotary_Q)
        key_TGd = self._rotate(self.k_layernorm(key_TGd), rotary_T)
        out_QHd = attend(query_QHd, Keys(key_TGd, value_TGd, key_QGd, value_QGd), self.head_dim**-0.5)
        return self.linear_proj(out_QHd.flatten(1))[0]

    def _split(self, projected: Tensor, queries_per_group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``[.., heads, d]`` from Megatron's layout: a group's queries, its key, its value."""
        grouped = projected.unflatten(-1, (-1, queries_per_group + 2, self.head_dim))
        query, key, value = grouped.split([queries_per_group, 1, 1], dim=-2)
        return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)

    def _rotate(self, x_NHd: Tensor, rotary_N: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x_NHd[:, None], rotary_N, config=self.config)[:, 0]


class DflashLayer(MegatronModule):
    """Pre-norm attention and SwiGLU. Parameters have the names of Megatron's transformer layer."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.input_layernorm = RmsNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = DflashAttention(config)
        self.pre_mlp_layernorm = RmsNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
        )

    def forward(self, hidden_QD: Tensor, *attention_inputs: Any) -> Tensor:
        """Output ``[Q, D]``. ``attention_inputs`` are those of ``DflashAttention``."""
        hidden_QD = hidden_QD + self.self_attention(self.input_layernorm(hidden_QD), *attention_inputs)
        return hidden_QD + self.mlp(self.pre_mlp_layernorm(hidden_QD))[0]


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
        self.hidden_norm = RmsNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.layers = nn.ModuleList([DflashLayer(config) for _ in range(config.num_layers)])
        self.norm = RmsNorm(config, config.hidden_size, config.layernorm_epsilon)
        self._rotary = rotary

    def context(self, captured: Sequence[Tensor]) -> Tensor:
        """Context of each token, ``[T, D]``, which all layers share, from its captured states."""
        # Megatron's own forward pass of ``fc`` would compute a gradient of the captured states.
        projected_Td = nn.functional.linear(torch.cat(list(captured), dim=-1), self.fc.weight)
        return self.hidden_norm(gather_from_tensor_model_parallel_region(projected_Td))

    def forward(
        self,
        context_TD: Tensor,
        slots_QD: Tensor,
        position_T: Tensor,
        position_Q: Tensor,
        attend: BlockAttention,
        *,
        num_positions: int,
    ) -> Tensor:
        """Output of every slot after the final norm, ``[Q, D]``."""
        # Layers apply this rank's weights to the context. Its gradient is summed over ranks once, for all layers.
        context_TD = copy_to_tensor_model_parallel_region(context_TD)
        rotary = self._rotary(num_positions, packed_seq=True)
        rotary_Q, rotary_T = rotary[position_Q], rotary[position_T]
        hidden_QD = slots_QD
        for layer in self.layers:
            hidden_QD = layer(hidden_QD, context_TD, rotary_Q, rotary_T, attend)
        return self.norm(hidden_QD)


def build_dflash(spec: DflashSpec, trunk: TransformerConfig, parallel: Parallel) -> DflashModule:
    """The draft's module on this rank's device, weights not yet loaded."""
    layers = spec.layers
    config = draft_config(
        trunk,
        num_layers=layers.num_layers,
        ffn_hidden_size=layers.ffn_hidden_size,
        num_attention_heads=layers.num_heads,
        num_query_groups=layers.num_kv_heads,
        kv_channels=layers.head_dim,
        layernorm_epsilon=layers.rms_norm_eps,
        add_qkv_bias=False,
        qk_layernorm=True,
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
