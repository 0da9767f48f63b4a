"""Drafts from scratch, written as checkpoint directories that trainer and engines load like any other draft.

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

from skyrl_spec.errors import ConfigError
from skyrl_spec.models.dtypes import DTYPES
from skyrl_spec.specs.dflash import DflashSpec, dflash_hf_config, dflash_tensor_shapes
from skyrl_spec.specs.files import POLICY_PATH, Shapes, read_config, weight_files
from skyrl_spec.specs.model import ModelSpec
from skyrl_spec.specs.mtp import MTP_ARCHITECTURES, mtp_tensor_shapes

INIT_STD = 0.02


def write_fresh_dflash(spec: DflashSpec, directory: Path, dtype: str, seed: int) -> None:
    """Writes a DFlash draft with random weights that ``seed`` determines."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _save(_random(dflash_tensor_shapes(spec), DTYPES[dtype], seed), directory / "model.safetensors")
    _write_json(directory / "config.json", dflash_hf_config(spec, str(DTYPES[dtype]).removeprefix("torch.")))


def write_fresh_mtp(spec: ModelSpec, directory: Path, dtype: str, seed: int) -> None:
    """Writes a copy of ``spec``'s checkpoint with a random MTP head, which replaces an existing one.

    A Qwen2 model becomes a MiMo model: a Qwen2 trunk with an MTP head.

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
    files = {file.name: load_file(file) for file in weight_files(spec.path, POLICY_PATH)}
    kept = {
        name: {key: tensor for key, tensor in tensors.items() if ".mtp_layers." not in key}
        for name, tensors in files.items()
    }
    kept["mtp_head.safetensors"] = _random(mtp_tensor_shapes(spec), DTYPES[dtype], seed)
    for name, tensors in kept.items():
        _save(tensors, directory / name)
    weight_map = {key: name for name, tensors in kept.items() for key in tensors}
    _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = read_config(spec.path) | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    _write_json(directory / "config.json", config | {"model_type": "qwen2", "attention_bias": spec.qkv_bias})


def _random(shapes: Shapes, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Tensors of ``shapes``: normal matrices, norms of one, biases of zero."""
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
