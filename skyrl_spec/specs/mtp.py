"""Shapes of the MTP head in a policy's checkpoint, with MiMo's names. Imports no torch."""

from __future__ import annotations

from skyrl_spec.specs.files import Shapes
from skyrl_spec.specs.model import ModelSpec, layer_tensor_shapes

# Architectures that vLLM serves with such an MTP head. To vLLM a Qwen2 model with this head is a MiMo model.
MTP_ARCHITECTURES = ("MiMoForCausalLM", "Qwen2ForCausalLM")
PREFIX = "model.mtp_layers.0."


def mtp_tensor_shapes(spec: ModelSpec) -> Shapes:
    """Shapes of the tensors in the first layer of the head. vLLM serves only that layer."""
    hidden = spec.hidden_size
    return {
        f"{PREFIX}token_layernorm.weight": (hidden,),
        f"{PREFIX}hidden_layernorm.weight": (hidden,),
        f"{PREFIX}input_proj.weight": (hidden, 2 * hidden),
        f"{PREFIX}final_layernorm.weight": (hidden,),
    } | layer_tensor_shapes(spec, PREFIX)
