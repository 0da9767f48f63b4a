"""Definition of a DFlash draft, one block at a time, to compare implementations with.

Shapes: S tokens of one document, n captured target layers, D hidden, K drafted tokens, V vocabulary.
Source of the architecture: "DFlash: Block Diffusion for Flash Speculative Decoding", arXiv 2602.06036.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM


class DflashReference:
    """A draft from a Hugging Face directory. ``weights`` are leaf tensors with gradients."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32):
        self.config = json.loads((path / "config.json").read_text())
        self.weights = {
            name: tensor.to(dtype).requires_grad_() for name, tensor in load_file(path / "model.safetensors").items()
        }
        self.target_layer_ids: list[int] = self.config["dflash_config"]["target_layer_ids"]
        self.mask_token: int = self.config["dflash_config"]["mask_token_id"]

    def draft_hidden(self, aux_hidden_SnD: Tensor, embeds_BD: Tensor, anchor: int) -> Tensor:
        """``[K+1, D]`` after the final norm; row i >= 1 drafts the token at position ``anchor`` + i.

        Args:
            aux_hidden_SnD: outputs of the target layers ``target_layer_ids``; only positions < ``anchor`` are read.
            embeds_BD: the target's embeddings of the block [token at ``anchor``, mask x K]; B = K + 1.
            anchor: position of the block's first token; at least 1.
        """
        features = aux_hidden_SnD[:anchor].flatten(1)
        context = self._norm("hidden_norm", features @ self.weights["fc.weight"].t())
        hidden = embeds_BD
        for index in range(self.config["num_hidden_layers"]):
            layer = f"layers.{index}"
            normed = self._norm(f"{layer}.input_layernorm", hidden)
            hidden = hidden + self._attention(f"{layer}.self_attn", context, normed, anchor)
            normed = self._norm(f"{layer}.post_attention_layernorm", hidden)
            gate, up = self._linear(f"{layer}.mlp.gate_proj", normed), self._linear(f"{layer}.mlp.up_proj", normed)
            hidden = hidden + self._linear(f"{layer}.mlp.down_proj", silu(gate) * up)
        return self._norm("norm", hidden)

    def logits(self, aux_hidden_SnD: Tensor, embeds_BD: Tensor, anchor: int, output_weight_VD: Tensor) -> Tensor:
        """``[K, V]``: logits of positions ``anchor`` + 1 ... ``anchor`` + K. ``output_weight_VD``: the target's."""
        return self.draft_hidden(aux_hidden_SnD, embeds_BD, anchor)[1:] @ output_weight_VD.t()

    def _attention(self, name: str, context: Tensor, block: Tensor, anchor: int) -> Tensor:
        """Attention in which every block token sees the whole context and the whole block."""
        head_dim = self.config["head_dim"]
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        both = torch.cat([context, block])
        outputs = []
        for head in range(self.config["num_attention_heads"]):
            rows, key_rows = _rows(head, head_dim), _rows(head // group, head_dim)
            query = self._norm(f"{name}.q_norm", block @ self.weights[f"{name}.q_proj.weight"][rows].t())
            key = self._norm(f"{name}.k_norm", both @ self.weights[f"{name}.k_proj.weight"][key_rows].t())
            value = both @ self.weights[f"{name}.v_proj.weight"][key_rows].t()
            query, key = self._rotate(query, first_position=anchor), self._rotate(key, first_position=0)
            outputs.append((query @ key.t() / math.sqrt(head_dim)).softmax(-1) @ value)
        return self._linear(f"{name}.o_proj", torch.cat(outputs, dim=-1))

    def _rotate(self, heads_Td: Tensor, first_position: int) -> Tensor:
        """RoPE for consecutive positions. Coordinate i rotates with coordinate i + d/2."""
        length, head_dim = heads_Td.shape
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        positions = torch.arange(first_position, first_position + length, dtype=torch.float64)
        angles = positions[:, None] / self.config["rope_theta"] ** exponents
        cos, sin = angles.cos().to(heads_Td.dtype), angles.sin().to(heads_Td.dtype)
        first, second = heads_Td.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].t()


class TargetReference:
    """Target tensors that the draft needs, from a forward pass of transformers."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32):
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.embedding_VD: Tensor = self._model.get_input_embeddings().weight.detach()
        self.output_weight_VD: Tensor = self._model.get_output_embeddings().weight.detach()

    @torch.no_grad()
    def aux_hidden(self, token_ids: list[int], layer_ids: list[int]) -> Tensor:
        """``[S, n, D]``: outputs of the target's layers (0-based), before any norm.

        These are transformers' ``hidden_states[id + 1]``, but for the last layer, whose entry there is normed.
        """
        outputs: dict[int, Tensor] = {}

        def keep(layer_id: int) -> torch.utils.hooks.RemovableHandle:
            def hook(_module: object, _args: object, output: Tensor) -> None:
                outputs[layer_id] = output[0]

            return self._model.model.layers[layer_id].register_forward_hook(hook)

        handles = [keep(layer_id) for layer_id in layer_ids]
        self._model(torch.tensor([token_ids]))
        for handle in handles:
            handle.remove()
        return torch.stack([outputs[layer_id] for layer_id in layer_ids], dim=1)

    def block_embeddings(self, token: int, mask_token: int, num_masks: int) -> Tensor:
        """``[K+1, D]``: embeddings of the block [``token``, mask x K]."""
        return self.embedding_VD[[token] + [mask_token] * num_masks]


def _rows(head: int, head_dim: int) -> slice:
    return slice(head * head_dim, (head + 1) * head_dim)
