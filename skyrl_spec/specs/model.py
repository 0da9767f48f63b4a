"""Shapes and constants of a decoder, from its Hugging Face ``config.json``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.specs.entries import Entries
from skyrl_spec.specs.files import POLICY_PATH, has_same_bytes, model_directory, read_config

_MIXTURE = "Qwen3MoeForCausalLM"
SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", _MIXTURE, "MiMoForCausalLM")
EMBEDDING, OUTPUT_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# End of the name of a layer's router.
ROUTER = "mlp.gate.weight"
# The trainer pads the rows of embedding and output head to a multiple of this times the tensor-parallel size.
_VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in every layer of a model."""

    num: int
    per_token: int
    ffn_hidden_size: int
    # Whether the weights of a token's experts are made to sum up to 1.
    is_normed: bool


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and constants of a Qwen2, Qwen3, Qwen3-MoE or MiMo model."""

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
    # None: the layers are dense.
    experts: Experts | None = None

    @property
    def num_active_ffn(self) -> int:
        """Feed-forward columns of a layer that a token goes through."""
        return self.ffn_hidden_size if self.experts is None else self.experts.per_token * self.experts.ffn_hidden_size


def parse_spec(directory: Path, config: dict[str, Any]) -> ModelSpec:
    """Spec of a model from its parsed ``config.json``.

    Raises:
        ConfigError: the architecture or an entry is not supported, or an entry is missing.
    """
    entries = Entries(config, f"{POLICY_PATH}={directory}")
    architecture = entries.architecture()
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"{POLICY_PATH}={directory}: architecture {architecture} is not supported; "
            f"use one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _refuse_unsupported(directory, config, architecture)
    is_qwen3, is_mixture = architecture in ("Qwen3ForCausalLM", _MIXTURE), architecture == _MIXTURE
    hidden_size, num_heads = entries.integer("hidden_size"), entries.integer("num_attention_heads")
    return ModelSpec(
        path=directory,
        architecture=architecture,
        vocab_size=entries.integer("vocab_size"),
        hidden_size=hidden_size,
        ffn_hidden_size=entries.integer("intermediate_size"),
        num_layers=entries.integer("num_hidden_layers"),
        num_heads=num_heads,
        # transformers has another default for a missing entry than for null.
        num_kv_heads=entries.integer("num_key_value_heads", num_heads if "num_key_value_heads" in config else None),
        head_dim=entries.integer("head_dim", 128 if is_qwen3 and not is_mixture else hidden_size // num_heads),
        rms_norm_eps=entries.number("rms_norm_eps"),
        rope_theta=entries.rope_theta(),
        max_position_embeddings=entries.integer("max_position_embeddings"),
        tie_word_embeddings=entries.flag("tie_word_embeddings", False),
        qkv_bias=entries.flag("attention_bias", not is_qwen3),
        qk_norm=is_qwen3,
        num_mtp_layers=entries.integer("num_nextn_predict_layers", 0, least=0),
        experts=_experts(entries) if is_mixture else None,
    )


def _experts(entries: Entries) -> Experts:
    experts = Experts(
        # transformers reads both names, and writes the newer one.
        num=entries.integer("num_experts", entries.integer("num_local_experts", 128)),
        per_token=entries.integer("num_experts_per_tok", 8),
        ffn_hidden_size=entries.integer("moe_intermediate_size", 768),
        is_normed=entries.flag("norm_topk_prob", False),
    )
    if experts.per_token > experts.num:
        raise ConfigError(
            f"{entries.where}: num_experts_per_tok={experts.per_token} in config.json is above "
            f"num_experts={experts.num}; copy it again"
        )
    return experts


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and output head in the trainer. Padding rows take no part in any softmax."""
    multiple = _VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


@lru_cache(maxsize=8)
def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a model's checkpoint, without those of its MTP head. Not to be changed."""
    embeddings = (spec.vocab_size, spec.hidden_size)
    shapes = {EMBEDDING: embeddings, "model.norm.weight": (spec.hidden_size,)}
    for layer in range(spec.num_layers):
        shapes |= layer_tensor_shapes(spec, f"model.layers.{layer}.")
    return shapes if spec.tie_word_embeddings else shapes | {OUTPUT_HEAD: embeddings}


def layer_tensor_shapes(spec: ModelSpec, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in one transformer layer. ``prefix`` ends in a dot."""
    hidden = spec.hidden_size
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
    }
    if spec.experts is None:
        shapes |= _ffn_shapes("mlp.", hidden, spec.ffn_hidden_size)
    else:
        shapes[ROUTER] = (spec.experts.num, hidden)
        for number in range(spec.experts.num):
            shapes |= _ffn_shapes(f"mlp.experts.{number}.", hidden, spec.experts.ffn_hidden_size)
    if spec.qkv_bias:
        shapes |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", query), ("k", key), ("v", key))}
    if spec.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (spec.head_dim,) for name in "qk"}
    return {prefix + name: shape for name, shape in shapes.items()}


def _ffn_shapes(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }


def is_of_expert(name: str) -> bool:
    """Whether a tensor of a checkpoint is a part of an expert."""
    return ".mlp.experts." in name


def require_tied_head(path: str, spec: ModelSpec) -> None:
    """Checks that a tied output head, if a local checkpoint stores it, is the embedding. Reads both tensors.

    Raises:
        ConfigError: it differs. vLLM and transformers would not use it, but another program may.
    """
    directory = Path(path)
    if not spec.tie_word_embeddings or not directory.is_dir():
        return
    if not has_same_bytes(directory, POLICY_PATH, OUTPUT_HEAD, EMBEDDING):
        raise ConfigError(
            f"{POLICY_PATH}={path}: config.json ties the output head to the embedding, but {OUTPUT_HEAD} differs from "
            f"{EMBEDDING}; set tie_word_embeddings to false there, or remove that tensor"
        )


def _refuse_unsupported(directory: Path, config: dict[str, Any], architecture: str) -> None:
    """Refuses entries of ``config.json`` that would give wrong results without an error if they were ignored."""
    unsupported = {
        "use_sliding_window": config.get("use_sliding_window", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": architecture.startswith("Qwen3") and config.get("attention_bias", False),
        # Layers without experts between those with them.
        "mlp_only_layers": architecture == _MIXTURE and config.get("mlp_only_layers"),
        "decoder_sparse_step": architecture == _MIXTURE and config.get("decoder_sparse_step", 1) != 1,
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
