"""Shapes of a DFlash draft, from its ``config.json`` or, from scratch, from the settings. Imports no torch.

A DFlash draft always starts from a directory, either the user's or one written with random weights. Trainer and engines
both read that directory, so that they agree about the draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.draft import DflashConfig
from skyrl_spec.specs.entries import Entries
from skyrl_spec.specs.files import model_directory, read_config, read_config_only
from skyrl_spec.specs.model import ModelSpec, layer_tensor_shapes

DFLASH_PATH = "trainer.dflash.path"
DRAFT_ARCHITECTURE = "DFlashDraftModel"
# Target models whose hidden states vLLM can pass to a draft.
DFLASH_TARGETS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
DEFAULT_NUM_LAYERS = 5
DEFAULT_BLOCK_SIZE = 16
# Block size -> gamma of the position weights, as published for DFlash.
_DECAY_GAMMAS = {8: 4.0, 10: 5.0, 16: 7.0}


@dataclass(frozen=True)
class DflashSpec:
    """Shape of a DFlash draft: its layers, described like those of a model, and its inputs."""

    layers: ModelSpec
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    # Layers of the target that the draft was trained for.
    num_target_layers: int


def default_target_layers(num_target_layers: int, num_layers: int) -> list[int]:
    """Layers ``round(1 + j (L - 4) / (n - 1))`` for j = 0 ... n - 1, with n draft layers and L target layers.

    With n = 1 the middle layer of the target.
    """
    if num_layers == 1:
        return [num_target_layers // 2]
    return [round(1 + j * (num_target_layers - 4) / (num_layers - 1)) for j in range(num_layers)]


def decay_gamma(dflash: DflashConfig, block_size: int) -> float:
    """Gamma of the position weights for blocks of ``block_size`` slots."""
    if dflash.loss_decay_gamma is not None:
        return dflash.loss_decay_gamma
    return _DECAY_GAMMAS.get(block_size, block_size / 2)


def read_dflash_spec(path: str, *, weights: bool = True) -> DflashSpec:
    """Shape of the draft at ``path``, a directory or hub name. A hub name is downloaded unless it is cached."""
    directory = model_directory(path, DFLASH_PATH, weights=weights)
    return parse_dflash_spec(directory, read_config(directory, DFLASH_PATH))


def read_dflash_config(path: str) -> DflashSpec:
    """Shape of the draft at ``path``, a directory or hub name. Of a hub name only ``config.json`` is downloaded."""
    return parse_dflash_spec(*read_config_only(path, DFLASH_PATH))


def parse_dflash_spec(directory: Path, config: dict[str, Any]) -> DflashSpec:
    """Shape of a draft from its parsed ``config.json``.

    Raises:
        ConfigError: it describes another kind of model, an entry is missing, or an entry is not supported.
    """
    setting = f"{DFLASH_PATH}={directory}"
    entries = Entries(config, setting)
    architecture = entries.architecture()
    if architecture != DRAFT_ARCHITECTURE:
        raise ConfigError(
            f"{setting}: is a {architecture}, but must be a {DRAFT_ARCHITECTURE}; give the directory of a DFlash draft"
        )
    dflash = entries.section("dflash_config")
    own = Entries(dflash, f"{setting}: dflash_config")
    _refuse_unsupported(setting, config, dflash)
    return DflashSpec(
        layers=ModelSpec(
            path=directory,
            architecture=architecture,
            vocab_size=entries.integer("vocab_size"),
            hidden_size=entries.integer("hidden_size"),
            ffn_hidden_size=entries.integer("intermediate_size"),
            num_layers=entries.integer("num_hidden_layers"),
            num_heads=entries.integer("num_attention_heads"),
            num_kv_heads=entries.integer("num_key_value_heads"),
            head_dim=entries.integer("head_dim"),
            rms_norm_eps=entries.number("rms_norm_eps"),
            # 1e6 is vLLM's default.
            rope_theta=entries.rope_theta(1e6),
            max_position_embeddings=entries.integer("max_position_embeddings"),
            tie_word_embeddings=False,
            qkv_bias=False,
            qk_norm=True,
            num_mtp_layers=0,
        ),
        block_size=entries.integer("block_size"),
        target_layer_ids=own.integers("target_layer_ids"),
        mask_token_id=own.integer("mask_token_id", least=0),
        num_target_layers=entries.integer("num_target_layers"),
    )


def _refuse_unsupported(setting: str, config: dict[str, Any], dflash: dict[str, Any]) -> None:
    """Refuses entries that would give wrong results without an error if they were ignored."""
    unsupported = {
        "dflash_config.causal": dflash.get("causal", False),
        "dflash_config.use_swa": dflash.get("use_swa", False),
        "attention_bias": config.get("attention_bias", False),
        "layer_types": any(kind != "full_attention" for kind in _layer_types(config)),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "draft_vocab_size": config.get("draft_vocab_size") not in (None, config.get("vocab_size")),
        "rope_scaling": bool(config.get("rope_scaling")),
        "target_hidden_size": config.get("target_hidden_size") not in (None, config.get("hidden_size")),
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ConfigError(f"{setting}: {name} in config.json is not supported; use a draft without it")


def _layer_types(config: dict[str, Any]) -> list[Any]:
    types = config.get("layer_types") or []
    return types if isinstance(types, list) else [types]


def fresh_dflash_spec(dflash: DflashConfig, target: ModelSpec, mask_token_id: int) -> DflashSpec:
    """Shape of a draft from scratch, whose layers are like those of the target, but dense."""
    num_layers = dflash.num_layers or DEFAULT_NUM_LAYERS
    ids = dflash.target_layer_ids or default_target_layers(target.num_layers, num_layers)
    layers = replace(
        target,
        path=Path(),
        architecture=DRAFT_ARCHITECTURE,
        num_layers=num_layers,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        num_mtp_layers=0,
        experts=None,
    )
    return DflashSpec(layers, dflash.block_size or DEFAULT_BLOCK_SIZE, tuple(ids), mask_token_id, target.num_layers)


def dflash_tensor_shapes(spec: DflashSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a draft's checkpoint."""
    hidden = spec.layers.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(spec.target_layer_ids) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(spec.layers.num_layers):
        shapes |= layer_tensor_shapes(spec.layers, f"layers.{layer}.")
    return shapes


def exported_dflash_config(spec: DflashSpec, dtype: str, dflash: DflashConfig) -> dict[str, Any]:
    """``config.json`` of an exported draft, which lies beside the directory ``model`` of its policy.

    It has the form of DFlash and that of the library speculators, by which ``vllm serve ./draft`` finds the policy.
    """
    config = dflash_hf_config(spec, dtype)
    if dflash.export_rope_scaling is not None:
        config["rope_scaling"] = dflash.export_rope_scaling
    return config | _speculators_entries(spec, config, dflash.num_speculative_tokens or spec.block_size - 1)


def _speculators_entries(spec: DflashSpec, config: dict[str, Any], num_speculative_tokens: int) -> dict[str, Any]:
    of_layers = set(config) - {"architectures", "block_size", "num_target_layers", "dflash_config"}
    return {
        "speculators_model_type": "dflash",
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_speculative_tokens}],
            # Relative to where the server is started, as every path is to vLLM.
            "verifier": {"name_or_path": "./model", "architectures": []},
        },
        "transformer_layer_config": {name: config[name] for name in sorted(of_layers)},
        "draft_vocab_size": spec.layers.vocab_size,
        "mask_token_id": spec.mask_token_id,
        # Index of a hidden state: 0 is the embedding, so layer i ends in i + 1.
        "aux_hidden_state_layer_ids": [layer + 1 for layer in spec.target_layer_ids],
    }


def dflash_hf_config(spec: DflashSpec, dtype: str) -> dict[str, Any]:
    """``config.json`` of a draft in the form that vLLM reads. ``dtype`` is torch's name, such as "float32"."""
    layers = spec.layers
    return {
        "architectures": [DRAFT_ARCHITECTURE],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": layers.hidden_size,
        "intermediate_size": layers.ffn_hidden_size,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "num_key_value_heads": layers.num_kv_heads,
        "head_dim": layers.head_dim,
        "rms_norm_eps": layers.rms_norm_eps,
        "rope_theta": layers.rope_theta,
        "max_position_embeddings": layers.max_position_embeddings,
        "vocab_size": layers.vocab_size,
        "tie_word_embeddings": False,
        "block_size": spec.block_size,
        "num_target_layers": spec.num_target_layers,
        "dflash_config": {
            "mask_token_id": spec.mask_token_id,
            "target_layer_ids": list(spec.target_layer_ids),
            "causal": False,
        },
        "dtype": dtype,
        "torch_dtype": dtype,
    }
