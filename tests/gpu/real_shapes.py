"""Trainers with the layer shapes of MiMo-7B and Qwen3-8B, as deep as asked, with random weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_shapes import MIMO_7B, QWEN3_8B
from tiny_checkpoints import batch_of_lengths

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.models import parallel
from skyrl_spec.planning.memory import plan_memory
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.dflash import dflash_hf_config, dflash_tensor_shapes, fresh_dflash_spec
from skyrl_spec.specs.model import load_spec, tensor_shapes
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

PROMPT_LENGTH = 1024
MASK_TOKEN = 7


@dataclass(frozen=True)
class RealModel:
    """``config.json`` of a model, and the kind of draft that its recipe trains."""

    config: dict[str, Any]
    draft: str

    @property
    def num_layers(self) -> int:
        return self.config["num_hidden_layers"]


MODELS = {"mimo_7b": RealModel(MIMO_7B, "mtp"), "qwen3_8b": RealModel(QWEN3_8B, "dflash")}
# What a CPU has in place of them.
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def write_configs(model: RealModel, folder: Path, num_layers: int, *, small: bool, length: int) -> Config:
    """Settings as in the model's recipe, for rows of ``length`` tokens, and the ``config.json`` files they point to."""
    shapes = model.config | {"num_hidden_layers": num_layers} | (SMALL | {"vocab_size": 1000} if small else {})
    path = folder / "model"
    _write_json(path / "config.json", shapes)
    config = Config()
    trainer = config.trainer
    trainer.policy.model.path = str(path)
    trainer.placement.device = "cpu" if small else "cuda"
    trainer.policy.megatron_config.dtype = "bf16"
    trainer.policy.megatron_config.recompute_granularity = "full"
    trainer.policy.megatron_config.use_distributed_optimizer = True
    trainer.max_tokens_per_microbatch = length
    trainer.max_prompt_length = min(PROMPT_LENGTH, length // 2)
    config.generator.sampling_params.max_generate_length = length - trainer.max_prompt_length
    trainer.mtp.enabled, trainer.dflash.enabled = model.draft == "mtp", model.draft == "dflash"
    trainer.mtp.num_speculative_tokens = 3
    if model.draft == "dflash":
        trainer.dflash.path, trainer.dflash.num_layers = str(folder / "draft"), min(5, num_layers)
        draft = fresh_dflash_spec(trainer.dflash, load_spec(str(path), weights=False), MASK_TOKEN)
        _write_json(folder / "draft" / "config.json", dflash_hf_config(draft, "bfloat16"))
        _write_zeros(folder / "draft" / "model.safetensors", dflash_tensor_shapes(draft))
    return config


def planned_bytes(model: RealModel, folder: Path, num_layers: int, length: int) -> int:
    """Memory of a worker with the model on CUDA."""
    config = write_configs(model, folder / f"plan of {num_layers}", num_layers, small=False, length=length)
    return plan_memory(config).worker.total


def build_trainer(config: Config, device: torch.device, *, freeze_policy: bool = False) -> PolicyTrainer:
    """The trainer, with random weights."""
    path = Path(config.trainer.policy.model.path)
    spec = load_spec(str(path))
    kind = trained_kind(config.trainer)
    of_head = {} if kind is None or kind.has_own_directory else kind.shapes(config, spec, None).tensors
    _write_zeros(path / "model.safetensors", {**tensor_shapes(spec), **of_head})
    trainer = PolicyTrainer(config, spec, join(device), total_optimizer_steps=1000, freeze_policy=freeze_policy)
    _randomize(trainer.model, trainer.policy)
    if trainer.draft is not None:
        _randomize(trainer.draft.draft.module, trainer.draft.trainable)
    return trainer


def join(device: torch.device) -> parallel.Parallel:
    """This process, alone in its process groups."""
    store = torch.distributed.HashStore()
    return parallel.initialize(
        rank=0, world_size=1, tensor_parallel_size=1, device=device, store=store, timeout_s=120.0
    )


def make_rows(config: Config, vocab_size: int, num_rows: int) -> TrainBatch:
    """Rows of full length, all response after the prompt."""
    prompt_lengths = np.full(num_rows, config.trainer.max_prompt_length)
    response_lengths = np.full(num_rows, config.generator.sampling_params.max_generate_length)
    return batch_of_lengths(np.random.default_rng(0), prompt_lengths, response_lengths, vocab_size=vocab_size)


def num_parameters(module: torch.nn.Module) -> int:
    """Number of elements in all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _randomize(module: torch.nn.Module, trainable: Trainable | None) -> None:
    """Random matrices, norms of 1 and biases of 0. A matrix product of zeros would be faster than a real one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            elif not name.endswith("bias"):
                parameter.fill_(1.0)
    if trainable is not None:
        trainable.optimizer.reload_model_params()


def _write_json(path: Path, content: Mapping[str, Any] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_zeros(path: Path, shapes: Mapping[str, Iterable[int]]) -> None:
    """A safetensors file of bf16 zeros that occupies no disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(list(shape)))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
