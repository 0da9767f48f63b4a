"""Drafts from scratch, written as checkpoint directories: trainer and engines then load them like any other.

``dtype`` is "fp32" or "bf16".
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyrl_spec.config import ConfigError
from skyrl_spec.draft_spec import DflashSpec, dflash_tensor_shapes, hf_config
from skyrl_spec.model_spec import ModelSpec, read_config

INIT_STD = 0.02
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MTP_ARCHITECTURES = ("MiMoForCausalLM", "Qwen2ForCausalLM")


def write_fresh_dflash(spec: DflashSpec, directory: Path, dtype: str, seed: int) -> None:
    """A DFlash draft with random weights; the same seed gives the same ones."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _save(_random(dflash_tensor_shapes(spec), _DTYPES[dtype], seed), directory / "model.safetensors")
    _write_json(directory / "config.json", hf_config(spec, str(_DTYPES[dtype]).removeprefix("torch.")))


def write_fresh_mtp(spec: ModelSpec, directory: Path, dtype: str, seed: int) -> None:
    """A copy of ``spec``'s checkpoint with a random MTP head in place of its own, if it has one.

    A Qwen2 model becomes a MiMo one, which is a Qwen2 trunk with such a head.

    Raises:
        ConfigError: vLLM serves no MTP head of this kind on the architecture.
    """
    if spec.architecture not in MTP_ARCHITECTURES:
        raise ConfigError(
            f"trainer.mtp.enabled=true: vLLM serves no MTP head on a {spec.architecture}; use a "
            f"{' or '.join(MTP_ARCHITECTURES)}, or trainer.dflash.enabled=true"
        )
    shutil.rmtree(directory, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json", "config.json")
    shutil.copytree(spec.path, directory, ignore=ignored)
    files = {file.name: load_file(file) for file in sorted(spec.path.glob("*.safetensors"))}
    kept = {
        name: {key: tensor for key, tensor in tensors.items() if ".mtp_layers." not in key}
        for name, tensors in files.items()
    }
    kept["mtp_head.safetensors"] = _random(_mtp_tensor_shapes(spec), _DTYPES[dtype], seed)
    for name, tensors in kept.items():
        _save(tensors, directory / name)
    weight_map = {key: name for name, tensors in kept.items() for key in tensors}
    _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = read_config(spec.path) | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    _write_json(directory / "config.json", config | {"model_type": "qwen2", "attention_bias": spec.qkv_bias})


def _mtp_tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """MiMo's MTP layer 0: a transformer layer of the trunk, and what combines its two inputs."""
    hidden, query, key = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    norms = ("token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm", "final_layernorm")
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in norms}
    shapes["input_proj.weight"] = (hidden, 2 * hidden)
    for name, size in (("q", query), ("k", key), ("v", key)):
        shapes[f"self_attn.{name}_proj.weight"] = (size, hidden)
        if spec.qkv_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (size,)
    shapes["self_attn.o_proj.weight"] = (hidden, query)
    for name in ("gate", "up"):
        shapes[f"mlp.{name}_proj.weight"] = (spec.ffn_hidden_size, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, spec.ffn_hidden_size)
    return {f"model.mtp_layers.0.{name}": shape for name, shape in shapes.items()}


def _random(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Normal matrices, norms of one and biases of zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            tensor = INIT_STD * torch.randn(shape, generator=generator)
        else:
            tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        weights[name] = tensor.to(dtype)
    return weights


def _save(weights: dict[str, Tensor], file: Path) -> None:
    save_file(weights, file, metadata={"format": "pt"})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
