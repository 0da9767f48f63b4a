"""Names of the weights of experts, as in published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def experts_as_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` with a tensor for each expert. transformers has one for all experts of a layer."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".experts.")
        if not layer:
            found[name] = tensor
            continue
        for number, of_expert in enumerate(tensor):
            parts = {kind: of_expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), of_expert.chunk(2), strict=True))
            found |= {f"{layer}.experts.{number}.{part}.weight": weight for part, weight in parts.items()}
    return found
