"""Policy and draft as a Hugging Face checkpoint directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from skyrl_spec.megatron.conversion import HfTensors
from skyrl_spec.megatron.trainer import PolicyTrainer

# Everything that is no weight and no config.json is copied as it is: tokenizer, chat template, generation config.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def save_hf(trainer: PolicyTrainer, directory: Path) -> None:
    """Write the current policy and draft below ``directory``; all ranks take part, rank 0 writes.

    Tensors of the source checkpoint that are not trained here (further MTP layers, say) are carried over. Dtype is the
    training dtype, and ``config.json`` says so. The directory appears under its name when it is complete.
    """
    weights: dict[str, Tensor] = {}
    if trainer.parallel.dp_rank == 0:
        for which in ("policy", "draft") if trainer.draft is not None else ("policy",):
            for name, tensor in trainer.export(which):
                if trainer.parallel.rank == 0:
                    weights[name] = tensor.cpu().clone()
    if trainer.parallel.rank != 0:
        return
    source, dtype = trainer.spec.path, next(trainer.model.parameters()).dtype
    untouched = HfTensors(source)
    for name in untouched.names():
        if name not in weights:
            weights[name] = untouched[name].to(dtype)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_torch_state_dict(weights, partial)
    _write_config(source, partial, dtype)
    for file in source.iterdir():
        if (
            file.is_file()
            and file.suffix not in _NOT_COPIED
            and file.name not in ("config.json",)
            and "safetensors" not in file.name
        ):
            shutil.copy2(file, partial / file.name)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    config = json.loads((source / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
