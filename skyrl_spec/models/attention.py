"""Core attention for Megatron's local layer spec: causal inside each document of a pack (``models.flash``).

Megatron's own local core attention keeps a ``[B, H, S, S]`` tensor of probabilities per layer. Shapes: T tokens, H
query heads, G key heads, d head size. Megatron's batch dimension is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from skyrl_spec.models.context_parallel import shared_attention
from skyrl_spec.models.flash import Documents, documents_attention
from skyrl_spec.models.pack import Share


@dataclass
class PackedDocuments(PackedSeqParams):
    """Carries documents through Megatron's layers to their core attention.

    The format ``sbhd`` keeps Megatron from rotating and reshaping packs by itself, which it does for ``thd``.
    """

    qkv_format: str = "sbhd"
    documents: Documents | None = None
    # Context parallelism: this rank's tokens.
    share: Share | None = None


class DocumentAttention(nn.Module):
    """Causal attention inside each document."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any):
        # Megatron also passes mask type, dropout and process groups, which have one value here.
        super().__init__()
        self.scale = config.softmax_scale or config.kv_channels**-0.5
        self.layer_number = layer_number

    def forward(
        self,
        query_T1Hd: Tensor,
        key_T1Gd: Tensor,
        value_T1Gd: Tensor,
        attention_mask: None,
        /,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """``[T, 1, H*d]``."""
        assert isinstance(packed_seq_params, PackedDocuments)
        documents, share = packed_seq_params.documents, packed_seq_params.share
        assert documents is not None
        heads_THd = query_T1Hd[:, 0], key_T1Gd[:, 0], value_T1Gd[:, 0]
        if share is None:
            out_THd = documents_attention(*heads_THd, documents, self.scale)
        else:
            out_THd = shared_attention(*heads_THd, share, self.scale)
        return out_THd.flatten(1)[:, None]


def key_value_rows(rows: Tensor, queries_per_group: int, head_dim: int) -> Tensor:
    """Rows of a ``linear_qkv`` weight or bias that produce keys and values, ``[2 G d, ...]``.

    Megatron's layout is, for each group, its queries, its key and its value.
    """
    grouped = rows.unflatten(0, (-1, queries_per_group + 2, head_dim))
    return grouped[:, queries_per_group:].flatten(0, 2)
