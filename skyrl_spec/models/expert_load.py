"""How many tokens each expert gets in training.

Shapes: L layers of the whole model, E experts of a layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skyrl_spec.metrics import names
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.policy import PolicyModel
from skyrl_spec.specs.model import Experts
from skyrl_spec.types import Metric, Metrics


class ExpertLoad:
    """Counts tokens where gradients are computed. Tokens that only fill up a pack count too."""

    def __init__(self, model: PolicyModel, num_layers: int, experts: Experts, parallel: Parallel):
        self._counts_LE = torch.zeros(num_layers, experts.num, dtype=torch.int64, device=parallel.device)
        for number, layer in enumerate(model.decoder.layers, start=model.num_layers_before):
            layer.mlp.router.register_forward_hook(partial(self._count, number))

    def metrics(self) -> Metrics:
        """Load of the busiest and the idlest experts since the last call. Collective over all ranks."""
        counts_LE = self._counts_LE.clone()
        self._counts_LE.zero_()
        # Layers of other pipeline stages are zero here.
        dist.all_reduce(counts_LE)
        highest, lowest = load_range(counts_LE)
        return {names.EXPERT_LOAD_MAX: Metric(highest, 1), names.EXPERT_LOAD_MIN: Metric(lowest, 1)}

    def _count(self, layer: int, _router: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        # Under recompute, the first of the two forward passes is without gradients.
        if torch.is_grad_enabled():
            _, is_chosen_TE = output
            self._counts_LE[layer] += is_chosen_TE.sum(dim=0)


def load_range(counts_LE: Tensor) -> tuple[float, float]:
    """Tokens of the busiest and of the idlest expert of a layer, as multiples of an even load: means over layers."""
    load_LE = counts_LE.double() / counts_LE.double().mean(dim=1, keepdim=True)
    highest, lowest = torch.stack([load_LE.amax(dim=1).mean(), load_LE.amin(dim=1).mean()]).tolist()
    return highest, lowest
