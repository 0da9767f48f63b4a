"""Shapes and constants of a dense decoder, from its Hugging Face ``config.json``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.specs.files import POLICY_PATH, model_directory, read_config

SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "MiMoForCausalLM")
# The trainer pads the rows of embedding and output head to a multiple of this times the tensor-parallel size.
_VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and constants of a Qwen2, Qwen3 or MiMo model."""

    path: Path
    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    num_mtp_layers: int


def parse_spec(directory: Path, config: dict[str, Any]) -> ModelSpec:
    """Spec of a model from its parsed ``config.json``.

    Raises:
        ConfigError: the architecture or an entry is not supported, or an entry is missing.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"{POLICY_PATH}={directory}: architecture {architecture} is not supported; "
            f"use one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    try:
        _refuse_unsupported(directory, config, architecture)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ConfigError(
                f"{POLICY_PATH}={directory}: RoPE scaling {rope} is not supported; use a model with plain RoPE"
            )
        return ModelSpec(
            path=directory,
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(config.get("rope_theta") or rope["rope_theta"]),
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=config.get("attention_bias", architecture != "Qwen3ForCausalLM"),
            qk_norm=architecture == "Qwen3ForCausalLM",
            num_mtp_layers=config.get("num_nextn_predict_layers") or 0,
        )
    except KeyError as error:
        raise ConfigError(f"{POLICY_PATH}={directory}: config.json has no entry {error}; add it") from None


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and output head in the trainer. Padding rows take no part in any softmax."""
    multiple = _VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a model's checkpoint, without those of its MTP head."""
    embeddings = (spec.vocab_size, spec.hidden_size)
    shapes = {"model.embed_tokens.weight": embeddings, "model.norm.weight": (spec.hidden_size,)}
    for layer in range(spec.num_layers):
        shapes |= layer_tensor_shapes(spec, f"model.layers.{layer}.")
    return shapes if spec.tie_word_embeddings else shapes | {"lm_head.weight": embeddings}


def layer_tensor_shapes(spec: ModelSpec, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in one transformer layer. ``prefix`` ends in a dot."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if spec.qkv_bias:
        shapes |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", query), ("k", key), ("v", key))}
    if spec.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (spec.head_dim,) for name in "qk"}
    return {prefix + name: shape for name, shape in shapes.items()}


def _refuse_unsupported(directory: Path, config: dict[str, Any], architecture: str) -> None:
    """Refuses entries of ``config.json`` that would give wrong results without an error if they were ignored."""
    unsupported = {
        "use_sliding_window": config.get("use_sliding_window", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": architecture == "Qwen3ForCausalLM" and config.get("attention_bias", False),
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{POLICY_PATH}={directory}: {name}={config[name]} in config.json is not supported; "
                "use a model without it"
            )


def load_spec(path: str, *, weights: bool = True) -> ModelSpec:
    """Spec of the model at ``path``, a directory or hub name. ``weights`` is as in ``model_directory``."""
    directory = model_directory(path, weights=weights)
    return parse_spec(directory, read_config(directory))
