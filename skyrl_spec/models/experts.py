"""The experts of a layer on this rank, all in two tensors, so that their products are grouped on a GPU.

Megatron's router chooses each token's experts, and its dispatcher brings the tokens to them and their outputs back.

Shapes: N tokens that came here, one row for each of their experts, sorted by expert. E experts of this rank, F columns
of each on this rank, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class GroupedExperts(MegatronModule):
    """SwiGLU experts. With tensor parallelism among experts, outputs are parts that the dispatcher sums up.

    Megatron's own need Transformer Engine or another package for grouped products, or compute one expert at a time.
    """

    def __init__(self, num_experts: int, config: TransformerConfig, pg_collection: Any = None, name: str | None = None):
        """``name``: since Megatron 0.19, of the module in the model."""
        super().__init__(config=config)
        assert config.moe_ffn_hidden_size is not None
        num_columns = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.gate_up_E2FD = _parameter(config, num_experts, 2, num_columns, config.hidden_size)
        self.down_EDF = _parameter(config, num_experts, config.hidden_size, num_columns)

    def forward(self, hidden_ND: Tensor, num_tokens_E: Tensor, weight_N: Tensor) -> tuple[Tensor, None]:
        """Outputs ``[N, D]``, each times its weight, and no bias.

        Args:
            num_tokens_E: tokens of each expert, on the CPU.
        """
        gate_up = grouped_linear(hidden_ND, self.gate_up_E2FD.flatten(1, 2), num_tokens_E)
        gate, up = gate_up.chunk(2, dim=-1)
        middle = (F.silu(gate) * up * weight_N[:, None]).to(hidden_ND.dtype)
        return grouped_linear(middle, self.down_EDF, num_tokens_E), None


def grouped_linear(rows_NK: Tensor, weight_EMK: Tensor, num_rows_E: Tensor) -> Tensor:
    """``[N, M]``: the rows of each expert times its weight. A rank without rows takes part in the backward pass."""
    if rows_NK.is_cuda and rows_NK.dtype == torch.bfloat16:
        ends_E = num_rows_E.cumsum(0).to(rows_NK.device, torch.int32, non_blocking=True)
        return F.grouped_mm(rows_NK, weight_EMK.transpose(1, 2), offs=ends_E)
    # One gradient for all: that of a slice would be as large as the whole weight, for each slice.
    parts = zip(rows_NK.split(num_rows_E.tolist()), weight_EMK.unbind(), strict=True)
    return torch.cat([F.linear(rows, weight_MK) for rows, weight_MK in parts])


def experts_spec() -> ModuleSpec:
    """Megatron's layer of experts around ``GroupedExperts``."""
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=GroupedExperts))


def _parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
    # Megatron's mark: the gradient is summed over the ranks with the same experts, not over all replicas.
    parameter.allreduce = False  # type: ignore[attr-defined]
    return parameter
