"""The model's own MTP head as a draft: Megatron's MultiTokenPredictionBlock, outside the policy.

Conventions are MiMo's, as vLLM serves it (``model_executor/models/mimo_mtp.py``):

- Inputs are the trunk's hidden state *before* the final norm, and the embedding of the next token.
- The embedding at position 0 of a document is zero.
- The output, after the head's own final norm, goes to the policy's output head. It is also the hidden state of the next
  depth.
- Depth d of base t has rotary position t+d-1 and attends as in ``chain_attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from skyrl_spec.drafts.align import chain_mask, followed_acceptance
from skyrl_spec.drafts.base import Draft, DraftSums, Supervision, Teacher
from skyrl_spec.drafts.chain_attention import ChainAttention
from skyrl_spec.errors import ConfigError
from skyrl_spec.losses.soft_ce import vocab_parallel_soft_ce
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.capture import CapturePoint
from skyrl_spec.models.conversion import mtp_rules
from skyrl_spec.models.pack import Pack, table_length
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.policy import layer_spec
from skyrl_spec.settings.draft import MtpConfig
from skyrl_spec.specs.model import ModelSpec

TRUNK_HIDDEN = CapturePoint("decoder.final_layernorm", "input")
EMBEDDING = CapturePoint("embedding", "output")


@dataclass(frozen=True)
class MtpSupervision(Supervision):
    """Supervised depths of all chains. N target positions."""

    # ``align.chain_mask``
    mask_KT: Tensor
    # Positions at which depth 1 is supervised. It is wherever a deeper depth is.
    position_N: Tensor
    # Position of the chain's base at depth d, at index d - 1.
    base_KN: Tensor
    mask_KN: Tensor
    # The sampled token behind each target position.
    label_N: Tensor


class MtpDraft(Draft):
    """MiMo's first MTP layer, unrolled ``unroll_steps`` deep on its own output."""

    capture_points = (TRUNK_HIDDEN, EMBEDDING)

    def __init__(
        self, config: MtpConfig, spec: ModelSpec, trunk: TransformerConfig, parallel: Parallel, temperature: float
    ):
        if spec.num_mtp_layers < 1:
            raise ConfigError(
                f"trainer.mtp.enabled=true: {spec.path} has no MTP head (num_nextn_predict_layers is 0); "
                "use a model that has one or set trainer.mtp.enabled=false"
            )
        self.config, self.spec, self.parallel, self.temperature = config, spec, parallel, temperature
        self.num_positions = config.unroll_steps or config.num_speculative_tokens
        self.module = _build_block(trunk, parallel)
        self.rules = mtp_rules(spec)
        self.source = spec.path
        self._rotary = RotaryEmbedding(
            spec.head_dim,
            rotary_percent=1.0,
            rotary_base=spec.rope_theta,
            use_cpu_initialization=parallel.device.type == "cpu",
        )

    def forward(self, trunk_TD: Tensor, embeds_TD: Tensor, pack: Pack) -> list[Tensor]:
        """Output of every depth, ``[T, D]`` each: ``out[d-1][t]`` drafts token t+d+1.

        Args:
            trunk_TD: hidden states of the trunk before its final norm.
            embeds_TD: embeddings of the same positions.
        """
        layer = self.module.layers[0]
        attention: ChainAttention = megatron_patches.mtp_transformer_layer(layer).self_attention.core_attention
        rotary = self._rotary(table_length(pack.documents.longest + self.num_positions))
        ids_1T = pack.token_ids_T[None]
        hidden_T1D, outputs = trunk_TD[:, None], []
        attention.reset(pack.documents)
        for depth in range(1, self.num_positions + 1):
            next_embeds_TD = torch.roll(embeds_TD, -depth, dims=0)
            if depth == 1:
                next_embeds_TD = next_embeds_TD.masked_fill((pack.position_T == 0)[:, None], 0.0)
            # Megatron returns a padding mask too since 0.18.
            hidden_T1D, *_ = layer(
                input_ids=ids_1T,
                position_ids=ids_1T,
                hidden_states=hidden_T1D,
                attention_mask=None,
                rotary_pos_emb=rotary[pack.position_T + depth - 1],
                embedding=_Constant(next_embeds_TD[:, None]),
            )
            outputs.append(hidden_T1D[:, 0])
        attention.reset(None)
        return outputs

    def supervise(self, pack: Pack, rows: Sequence[int]) -> tuple[MtpSupervision]:
        mask_KT = chain_mask(pack.loss_mask_T, pack.segment_ids_T, self.num_positions)
        position_N = mask_KT[0].nonzero().squeeze(1)
        mask_KN = mask_KT[:, position_N]
        depth_K1 = torch.arange(1, self.num_positions + 1)[:, None]
        supervision = MtpSupervision(
            weight=float(mask_KN.sum()),
            mask_KT=mask_KT,
            position_N=position_N,
            base_KN=(position_N - depth_K1).clamp(min=0),
            mask_KN=mask_KN,
            label_N=pack.token_ids_T[position_N + 1],
        )
        return (supervision,)

    def propose(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, pack: Pack, anchors: Sequence[int]
    ) -> Tensor:
        outputs = self.forward(captured[TRUNK_HIDDEN], captured[EMBEDDING], pack)
        # The anchor is the sampled token that a chain starts from. The chain's base is the position before it.
        base_A = torch.tensor(anchors, device=pack.token_ids_T.device) - 1
        return torch.stack([out[base_A] for out in outputs], dim=1)

    def loss(
        self,
        captured: dict[CapturePoint, Tensor],
        teacher: Teacher,
        pack: Pack,
        supervision: Supervision,
        denominator: Tensor,
    ) -> tuple[Tensor, DraftSums]:
        assert isinstance(supervision, MtpSupervision)
        outputs = self.forward(captured[TRUNK_HIDDEN], captured[EMBEDDING], pack)
        position_N, mask_KN = supervision.position_N, supervision.mask_KN
        result = vocab_parallel_soft_ce(
            torch.stack([out[base_N] for out, base_N in zip(outputs, supervision.base_KN, strict=True)]),
            teacher.hidden_TD[position_N],
            teacher.output_weight_vD,
            mask_KN / denominator.clamp(min=1.0).to(torch.float32),
            vocab_size=self.spec.vocab_size,
            temperature=self.temperature,
            chunk_size=self.config.loss_chunk_size,
            group=self.parallel.tp_group,
            loss_type=self.config.loss_type,
            topk=self.config.loss_topk,
            labels_T=supervision.label_N,
            fp32_logits=self.fp32_logits,
        )
        mask_KT = supervision.mask_KT
        accept_prob_KT = torch.zeros(mask_KT.shape, dtype=torch.float64, device=mask_KT.device)
        accept_prob_KT[:, position_N] = result.accept_prob_KT.double()
        hit_KT = torch.zeros_like(mask_KT)
        hit_KT[:, position_N] = result.argmax_KT == supervision.label_N
        accepted_K, num_chains = followed_acceptance(accept_prob_KT, hit_KT, mask_KT)
        sums = DraftSums(
            loss=result.loss.detach().double(),
            top1_agreements_K=(result.top1_KT & mask_KN).sum(dim=1).double(),
            num_targets_K=mask_KN.sum(dim=1).double(),
            accepted_K=accepted_K,
            num_chains=num_chains,
        )
        return result.loss, sums


class _Constant:
    """Replacement for the embedding module that Megatron's MTP layer calls. It returns given rows."""

    def __init__(self, embeds_T1D: Tensor):
        self.embeds_T1D = embeds_T1D

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embeds_T1D


def _build_block(trunk: TransformerConfig, parallel: Parallel) -> MultiTokenPredictionBlock:
    """One MTP layer of the trunk's shape.

    Recompute is off, because ``ChainAttention`` would append the keys of a depth again when the layer runs again.
    """
    config = replace(
        trunk, mtp_num_layers=1, recompute_granularity=None, recompute_method=None, recompute_num_layers=None
    )
    layer = get_mtp_layer_spec_for_backend(layer_spec(config, ChainAttention), backend=LocalSpecProvider())
    spec = ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )
    with megatron_patches.megatron_device(parallel.device):
        return MultiTokenPredictionBlock(config=config, spec=spec).to(parallel.device, config.params_dtype)
