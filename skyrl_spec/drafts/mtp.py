"""The model's own MTP head as a draft: Megatron's MultiTokenPredictionBlock, outside the policy.

Conventions are MiMo's, as vLLM serves it (``model_executor/models/mimo_mtp.py``):

- Inputs are the trunk's hidden state *before* the final norm, and the embedding of the next token.
- The embedding at position 0 of a document is zero.
- The output, after the head's own final norm, goes to the policy's output head. It is also the hidden state of the next
  depth.
- Depth d of base t has rotary position t+d-1 and attends as in ``chain_attention``.
"""

from __future__ import annotations

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

from skyrl_spec.drafts.align import chain_mask, document_starts, followed_acceptance
from skyrl_spec.drafts.base import BatchTokens, Draft, DraftSums, Supervision, Teacher
from skyrl_spec.drafts.chain_attention import ChainAttention
from skyrl_spec.errors import ConfigError
from skyrl_spec.losses.soft_ce import vocab_parallel_soft_ce
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.capture import CapturePoint
from skyrl_spec.models.conversion import mtp_rules
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.policy import layer_spec
from skyrl_spec.settings.draft import MtpConfig
from skyrl_spec.specs.model import ModelSpec

TRUNK_HIDDEN = CapturePoint("decoder.final_layernorm", "input")
EMBEDDING = CapturePoint("embedding", "output")


@dataclass(frozen=True)
class MtpSupervision(Supervision):
    """Supervised depths of all chains."""

    # ``align.chain_mask``
    mask_KBS: Tensor


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

    def forward(self, trunk_SBD: Tensor, embeds_SBD: Tensor, targets: BatchTokens) -> list[Tensor]:
        """Output of every depth, ``[S, B, D]`` each: ``out[d-1][t]`` drafts token t+d+1.

        Args:
            trunk_SBD: hidden states of the trunk before its final norm.
            embeds_SBD: embeddings of the same positions.
        """
        layer = self.module.layers[0]
        attention: ChainAttention = megatron_patches.mtp_transformer_layer(layer).self_attention.core_attention
        seq_len = trunk_SBD.shape[0]
        rotary = self._rotary(seq_len + self.num_positions)
        starts_SB1 = document_starts(targets.segment_ids).t()[..., None]
        hidden_SBD, outputs = trunk_SBD, []
        attention.reset()
        for depth in range(1, self.num_positions + 1):
            next_embeds_SBD = torch.roll(embeds_SBD, -depth, dims=0)
            if depth == 1:
                next_embeds_SBD = next_embeds_SBD.masked_fill(starts_SB1, 0.0)
            # Megatron returns a padding mask too since 0.18.
            hidden_SBD, *_ = layer(
                input_ids=targets.token_ids,
                position_ids=targets.token_ids,
                hidden_states=hidden_SBD,
                attention_mask=targets.attention_mask,
                rotary_pos_emb=rotary[depth - 1 : depth - 1 + seq_len],
                embedding=_Constant(next_embeds_SBD),
            )
            outputs.append(hidden_SBD)
        attention.reset()
        return outputs

    def supervise(self, targets: BatchTokens) -> MtpSupervision:
        mask_KBS = chain_mask(targets.loss_mask, targets.segment_ids, self.num_positions)
        return MtpSupervision(targets, mask_KBS.sum().double(), mask_KBS)

    def propose(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, targets: BatchTokens, anchor_B: Tensor
    ) -> Tensor:
        outputs = self.forward(captured[TRUNK_HIDDEN], captured[EMBEDDING], targets)
        # The anchor is the sampled token that a chain starts from. The chain's base is the position before it.
        rows_B = torch.arange(len(anchor_B), device=anchor_B.device)
        return torch.stack([out[anchor_B - 1, rows_B] for out in outputs], dim=1)

    def loss(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, supervision: Supervision, denominator: Tensor
    ) -> tuple[Tensor, DraftSums]:
        assert isinstance(supervision, MtpSupervision)
        outputs = self.forward(captured[TRUNK_HIDDEN], captured[EMBEDDING], supervision.targets)
        mask_KBS = supervision.mask_KBS
        # Depth 1 is supervised wherever a deeper depth is, so its target positions include all.
        batch_T, position_T = mask_KBS[0].nonzero(as_tuple=True)
        mask_KT = mask_KBS[:, batch_T, position_T]
        draft_hidden_KTD = torch.stack(
            [out[(position_T - depth).clamp(min=0), batch_T] for depth, out in enumerate(outputs, start=1)]
        )
        labels_T = supervision.targets.token_ids[batch_T, position_T + 1]
        result = vocab_parallel_soft_ce(
            draft_hidden_KTD,
            teacher.hidden_SBD[position_T, batch_T],
            teacher.output_weight_vD,
            mask_KT / denominator.clamp(min=1.0).to(torch.float32),
            vocab_size=self.spec.vocab_size,
            temperature=self.temperature,
            chunk_size=self.config.loss_chunk_size,
            group=self.parallel.tp_group,
            loss_type=self.config.loss_type,
            topk=self.config.loss_topk,
            labels_T=labels_T,
            fp32_logits=self.fp32_logits,
        )
        accept_prob_KBS = torch.zeros(mask_KBS.shape, dtype=torch.float64, device=mask_KBS.device)
        accept_prob_KBS[:, batch_T, position_T] = result.accept_prob_KT.double()
        hit_KBS = torch.zeros_like(mask_KBS)
        hit_KBS[:, batch_T, position_T] = result.argmax_KT == labels_T
        accepted_K, num_chains = followed_acceptance(accept_prob_KBS, hit_KBS, mask_KBS)
        sums = DraftSums(
            loss=result.loss.detach().double(),
            top1_agreements_K=(result.top1_KT & mask_KT).sum(dim=1).double(),
            num_targets_K=mask_KT.sum(dim=1).double(),
            accepted_K=accepted_K,
            num_chains=num_chains,
        )
        return result.loss, sums


class _Constant:
    """Replacement for the embedding module that Megatron's MTP layer calls. It returns given rows."""

    def __init__(self, embeds_SBD: Tensor):
        self.embeds_SBD = embeds_SBD

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embeds_SBD


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
