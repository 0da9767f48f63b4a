"""The MTP head in a policy's checkpoint, by MiMo's names. Imports no torch."""

from __future__ import annotations

from skyrl_spec.specs.files import Shapes
from skyrl_spec.specs.model import ModelSpec, layer_tensor_shapes

# Architectures that vLLM serves with an MTP head of this kind. A Qwen2 model with such a head is a MiMo model.
MTP_ARCHITECTURES = ("MiMoForCausalLM", "Qwen2ForCausalLM")
PREFIX = "model.mtp_layers.0."


def mtp_tensor_shapes(spec: ModelSpec) -> Shapes:
    """Names and shapes of the tensors in the first layer of the head, the one that vLLM serves."""
    hidden = spec.hidden_size
    return {
        f"{PREFIX}token_layernorm.weight": (hidden,),
        f"{PREFIX}hidden_layernorm.weight": (hidden,),
        f"{PREFIX}input_proj.weight": (hidden, 2 * hidden),
        f"{PREFIX}final_layernorm.weight": (hidden,),
    } | layer_tensor_shapes(spec, PREFIX)
