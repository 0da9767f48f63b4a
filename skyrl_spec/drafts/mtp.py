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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from skyrl_spec.drafts.align import chain_mask, followed_acceptance, shift_right
from skyrl_spec.drafts.base import Draft, DraftSums, RolloutSampling, Supervision, Teacher
from skyrl_spec.drafts.chain_attention import ChainAttention, ChainKeys
from skyrl_spec.drafts.shares import StepRandom, draw_windows
from skyrl_spec.errors import ConfigError
from skyrl_spec.losses.draft_loss import draft_loss
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.attention import key_value_rows
from skyrl_spec.models.capture import EMBEDDING, CapturePoint
from skyrl_spec.models.context_parallel import Reach, gathered, sum_over_ranks
from skyrl_spec.models.conversion import mtp_rules
from skyrl_spec.models.flash import Documents
from skyrl_spec.models.norm import RmsNorm
from skyrl_spec.models.pack import Pack, Share, ranges, table_length
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.policy import draft_config, layer_spec
from skyrl_spec.models.upload import upload
from skyrl_spec.settings.draft import MtpConfig
from skyrl_spec.specs.model import ModelSpec

TRUNK_HIDDEN = CapturePoint("decoder.final_layernorm", "input")


@dataclass(frozen=True)
class Chains:
    """Chains of a pack, and what they read of it. Their bases are consecutive tokens of some of its documents.

    C chains, S tokens.
    """

    # Index in the pack of each chain's base, and of each token whose depth-1 key some chain sees.
    base_C: Tensor
    token_S: Tensor
    # Both as documents. The bases are the last tokens of each.
    bases: Documents
    tokens: Documents
    # Rows of the states that the chains read.
    reach: Reach


@dataclass(frozen=True)
class MtpSupervision(Supervision):
    """Supervised depths of the chains that this rank trains. N target positions."""

    chains: Chains
    # ``align.chain_mask`` of all ranks' chains
    mask_KT: Tensor
    # Bases of the chains in the predicted acceptance length.
    is_counted_T: Tensor
    # Positions at which any depth is supervised.
    position_N: Tensor
    # Number of the chain whose depth d has this target position, at index d - 1.
    chain_KN: Tensor
    mask_KN: Tensor
    # The sampled token behind each target position.
    label_N: Tensor
    # Drafted tokens that are accepted this probably are taken as accepted (``Draft.chances``).
    chance_KN: Tensor


class MtpDraft(Draft):
    """MiMo's first MTP layer, unrolled ``unroll_steps`` deep on its own output.

    The layer runs on the chains that are trained. Of the tokens that they see, only depth-1 keys are computed.
    """

    capture_points = (TRUNK_HIDDEN, EMBEDDING)

    def __init__(
        self,
        config: MtpConfig,
        spec: ModelSpec,
        trunk: TransformerConfig,
        parallel: Parallel,
        sampling: RolloutSampling,
        seed: int,
    ):
        if spec.num_mtp_layers < 1:
            raise ConfigError(
                f"trainer.mtp.enabled=true: {spec.path} has no MTP head (num_nextn_predict_layers is 0); "
                "use a model that has one or set trainer.mtp.enabled=false"
            )
        self.config, self.spec, self.parallel, self.sampling = config, spec, parallel, sampling
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
        self.random = StepRandom(seed)

    def begin_step(self, loss_mask_BS: np.ndarray) -> None:
        # A base drafts after the next token. Both that and the drafted one are trained.
        is_base_BS = np.zeros_like(loss_mask_BS)
        is_base_BS[:, :-2] = loss_mask_BS[:, 1:-1] & loss_mask_BS[:, 2:]
        # Paths from all bases meet after a few chains.
        num_ignored = 2 * (self.num_positions + 1)
        share = self.config.positions_per_step
        self._windows = draw_windows(is_base_BS, share, num_ignored, self.random.next_step())

    def forward(self, trunk_TD: Tensor, embeds_TD: Tensor, pack: Pack, chains: Chains) -> Tensor:
        """Output of every depth of the chains, ``[K, C, D]``: ``out[d-1]`` drafts token base + d + 1.

        Args:
            trunk_TD: hidden states of the trunk before its final norm.
            embeds_TD: embeddings of the same positions.
        """
        layer, reach = self.module.layers[0], chains.reach
        transformer_layer = megatron_patches.mtp_transformer_layer(layer)
        rotary = self._rotary(table_length(pack.documents.longest + self.num_positions), packed_seq=True)
        embeds_XD = reach.rows(embeds_TD, pack.share)

        def joined(hidden_ND: Tensor, token_N: Tensor, depth: int) -> Tensor:
            # What lies beyond the pack's end is not supervised.
            next_embeds_ND = embeds_XD[reach.row_P[token_N + depth]]
            if depth == 1:
                next_embeds_ND = next_embeds_ND.masked_fill((pack.position_T[token_N] == 0)[:, None], 0.0)
            return layer._concat_embeddings(hidden_ND[:, None], next_embeds_ND[:, None])

        def first_keys(token_N: Tensor) -> tuple[Tensor, Tensor]:
            joined_N1D = joined(trunk_TD[reach.row_P[token_N]], token_N, 1)
            return _keys_and_values(transformer_layer, joined_N1D, rotary[pack.position_T[token_N]])

        if pack.share is None:
            key_SGd, value_SGd = first_keys(chains.token_S)
        else:
            own_keys = first_keys(pack.own(torch.arange(len(pack.token_ids_T), device=trunk_TD.device)))
            key_SGd, value_SGd = gathered(torch.stack(own_keys, dim=1), pack.share)[chains.token_S].unbind(1)
        keys = ChainKeys(key_SGd, value_SGd, chains.tokens, chains.bases)
        hidden_CD, outputs = trunk_TD[reach.row_P[chains.base_C]], []
        for depth in range(1, self.num_positions + 1):
            hidden_C1D, *_ = transformer_layer(
                hidden_states=joined(hidden_CD, chains.base_C, depth),
                attention_mask=None,
                rotary_pos_emb=rotary[pack.position_T[chains.base_C] + depth - 1],
                packed_seq_params=keys,
            )
            hidden_CD = layer._postprocess(hidden_C1D)[:, 0]
            outputs.append(hidden_CD)
        return torch.stack(outputs)

    def supervise(self, pack: Pack, rows: Sequence[int]) -> tuple[MtpSupervision, ...]:
        windows, starts_N = self._windows, np.asarray(pack.documents.starts[:-1])
        begin_N, end_N, counted_N = (
            starts_N + of_rows[list(rows)] for of_rows in (windows.begin_B, windows.end_B, windows.counted_B)
        )
        if not (end_N > begin_N).any():
            return ()
        chains = _chains(pack, starts_N, begin_N, end_N, self.num_positions)
        is_base_T, is_counted_T = (_is_in(pack, first_N, end_N) for first_N in (begin_N, counted_N))
        mask_KT = chain_mask(pack.loss_mask_T, pack.segment_ids_T, self.num_positions)
        mask_KT &= _at_targets(is_base_T, self.num_positions)
        own_KT = mask_KT
        if pack.share is not None:
            is_own_T = torch.zeros_like(is_base_T)
            is_own_T[pack.share.positions] = True
            own_KT = mask_KT & _at_targets(is_own_T, self.num_positions)
        position_N = own_KT.any(dim=0).nonzero().squeeze(1)
        mask_KN = own_KT[:, position_N]
        depth_K1 = torch.arange(1, self.num_positions + 1)[:, None]
        number_T = torch.zeros_like(pack.position_T)
        number_T[chains.base_C] = torch.arange(len(chains.base_C))
        supervision = MtpSupervision(
            weight=float(mask_KN.sum()),
            chains=chains,
            mask_KT=mask_KT,
            is_counted_T=is_counted_T,
            position_N=position_N,
            chain_KN=number_T[(position_N - depth_K1).clamp(min=0)],
            mask_KN=mask_KN,
            label_N=pack.token_ids_T[position_N + 1],
            chance_KN=self.chances(pack, rows)[:, position_N],
        )
        return (supervision,)

    def propose(
        self, captured: dict[CapturePoint, Tensor], teacher: Teacher, pack: Pack, anchors: Sequence[int]
    ) -> Tensor:
        starts_N, device = np.asarray(pack.documents.starts), pack.token_ids_T.device
        chains = _chains(pack, starts_N[:-1], starts_N[:-1], starts_N[1:], self.num_positions)
        # The anchor is the sampled token that a chain starts from. The chain's base is the position before it.
        base_A = np.asarray(anchors) - 1
        own_A = pack.owned(base_A)
        # All bases of this rank are there, ascending.
        number_a = np.searchsorted(chains.base_C.numpy(), base_A[own_A])
        out_KCD = self.forward(captured[TRUNK_HIDDEN], captured[EMBEDDING], pack, upload(chains, device))
        proposed_AKD = out_KCD.new_zeros(len(anchors), len(out_KCD), out_KCD.shape[2])
        proposed_AKD[torch.from_numpy(own_A)] = out_KCD[:, torch.from_numpy(number_a)].transpose(0, 1)
        return sum_over_ranks(proposed_AKD, pack.share)

    def loss(
        self,
        captured: dict[CapturePoint, Tensor],
        teacher: Teacher,
        pack: Pack,
        supervision: Supervision,
        denominator: Tensor,
    ) -> tuple[Tensor, DraftSums]:
        assert isinstance(supervision, MtpSupervision)
        out_KCD = self.forward(captured[TRUNK_HIDDEN], captured[EMBEDDING], pack, supervision.chains)
        position_N, mask_KN = supervision.position_N, supervision.mask_KN
        weights_KN = mask_KN / denominator.clamp(min=1.0).to(torch.float32)
        num_depths, num_chains = out_KCD.shape[:2]
        depth_K1 = torch.arange(num_depths, device=mask_KN.device)[:, None]
        reach = supervision.chains.reach
        loss, result = draft_loss(
            self.config.loss_type,
            out_KCD.gather(1, supervision.chain_KN[..., None].expand(-1, -1, out_KCD.shape[2])),
            reach.rows(teacher.hidden_TD, pack.share)[reach.row_P[position_N]],
            teacher.output_weight_vD,
            weights_KN,
            depth_K1 * num_chains + supervision.chain_KN,
            (num_depths, num_chains),
            vocab_size=self.spec.vocab_size,
            **self.sampling._asdict(),
            chunk_size=self.config.loss_chunk_size,
            group=self.parallel.tp_group,
            topk=self.config.loss_topk,
            labels_T=supervision.label_N,
            fp32_logits=self.fp32_logits,
        )
        mask_KT = supervision.mask_KT
        accept_prob_KT = torch.zeros(mask_KT.shape, dtype=torch.float64, device=mask_KT.device)
        accept_prob_KT[:, position_N] = result.accept_prob_KT.double()
        hit_KT = torch.zeros_like(mask_KT)
        hit_KT[:, position_N] = result.accept_label_KT > supervision.chance_KN
        if pack.share is not None:
            # A response is followed over the chains of all ranks, by all of them. The first one counts it.
            accept_prob_KT, hit_KT = sum_over_ranks(torch.stack([accept_prob_KT, hit_KT.double()]), pack.share)
            hit_KT = hit_KT > 0
        accepted_K, num_followed = followed_acceptance(accept_prob_KT, hit_KT, mask_KT, supervision.is_counted_T)
        counts = pack.share is None or pack.share.rank == 0
        sums = DraftSums(
            loss=loss.detach().double(),
            top1_agreements_K=(result.top1_KT & mask_KN).sum(dim=1).double(),
            num_targets_K=mask_KN.sum(dim=1).double(),
            accepted_K=accepted_K * counts,
            num_chains=num_followed * counts,
        )
        return loss, sums


def _chains(pack: Pack, starts_N: np.ndarray, begin_N: np.ndarray, end_N: np.ndarray, num_positions: int) -> Chains:
    """This rank's chains with the bases ``begin`` to ``end`` (exclusive) of each document from ``start``, on the CPU.

    Documents without a base are left out, and so are the tokens behind the last base. A rank without a base gets one
    that nobody supervises, so that it takes part in the exchange of keys.
    """
    if pack.share is not None:
        starts_N, begin_N, end_N = _of_share(pack.share, starts_N, begin_N, end_N)
    is_read_N = end_N > begin_N
    starts_N, begin_N, end_N = starts_N[is_read_N], begin_N[is_read_N], end_N[is_read_N]
    bases, tokens = (Documents.of((end_N - first_N).tolist()) for first_N in (begin_N, starts_N))
    base_C, token_S = (torch.from_numpy(ranges(first_N, end_N)) for first_N in (begin_N, starts_N))
    return Chains(base_C, token_S, bases, tokens, Reach.of(pack, num_positions))


def _of_share(
    share: Share, starts_N: np.ndarray, begin_N: np.ndarray, end_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of windows that lie in this rank's chunks, those of one chunk after the other."""
    chunks = [chunk.tokens for chunk in share.chunks]
    begin = np.concatenate([np.maximum(begin_N, chunk.start) for chunk in chunks])
    end = np.concatenate([np.minimum(end_N, chunk.stop) for chunk in chunks])
    starts = np.tile(starts_N, len(chunks))
    if (end > begin).any():
        return starts, begin, end
    first = chunks[0].start
    return np.array([share.chunks[0].keys.start]), np.array([first]), np.array([first + 1])


def _at_targets(is_base_T: Tensor, num_depths: int) -> Tensor:
    """Bool ``[K, T]``: whether a chain from one of these bases has this target position at depth d."""
    return torch.stack([shift_right(is_base_T, depth) for depth in range(1, num_depths + 1)])


def _is_in(pack: Pack, first_N: np.ndarray, end_N: np.ndarray) -> Tensor:
    """Bool ``[T]``: whether a token lies from ``first`` to ``end`` (exclusive) of its document."""
    index_T, document_T = torch.arange(len(pack.token_ids_T)), pack.segment_ids_T - 1
    return (index_T >= torch.from_numpy(first_N)[document_T]) & (index_T < torch.from_numpy(end_N)[document_T])


def _keys_and_values(layer: Any, joined_S1D: Tensor, rotary_S: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a transformer layer, ``[S, G, d]``, as the layer computes them, without its queries."""
    attention = layer.self_attention
    hidden_SD = copy_to_tensor_model_parallel_region(layer.input_layernorm(joined_S1D)[:, 0])
    queries_per_group = attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
    head_dim = attention.hidden_size_per_attention_head
    weight, bias = attention.linear_qkv.weight, attention.linear_qkv.bias
    weight = key_value_rows(weight, queries_per_group, head_dim)
    bias = None if bias is None else key_value_rows(bias, queries_per_group, head_dim)
    grouped_SG2d = nn.functional.linear(hidden_SD, weight, bias).unflatten(1, (-1, 2, head_dim))
    key_SGd, value_SGd = grouped_SG2d.unbind(2)
    if attention.k_layernorm is not None:
        key_SGd = attention.k_layernorm(key_SGd)
    return apply_rotary_pos_emb(key_SGd[:, None], rotary_S, config=layer.config)[:, 0], value_SGd


class _Backend(LocalSpecProvider):
    """Modules of the MTP layer around its transformer layer."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_: Any) -> type:
        return RmsNorm


def _build_block(trunk: TransformerConfig, parallel: Parallel) -> MultiTokenPredictionBlock:
    """One MTP layer of the trunk's shape.

    With recompute, ``ChainKeys`` would take the keys of a depth again when the layer runs again.
    """
    config = draft_config(trunk, mtp_num_layers=1)
    layer = get_mtp_layer_spec_for_backend(layer_spec(config, ChainAttention), backend=_Backend())
    spec = ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )
    with megatron_patches.megatron_device(parallel.device):
        return MultiTokenPredictionBlock(config=config, spec=spec).to(parallel.device, config.params_dtype)
