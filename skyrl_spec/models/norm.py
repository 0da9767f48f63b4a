"""RMSNorm for Megatron's layers: PyTorch's, with the mark that sequence parallelism needs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension.

    Megatron's own class for this norm refuses sequence parallelism. There each rank norms its part of the sequence, so
    Megatron sums the gradients of marked weights over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        # Megatron also passes the kind of norm and of kernel, which have one value here.
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x``, in its dtype."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
