"""Tiny random checkpoints of every supported architecture, whose heads TP=2 divides, and training batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from mtp_reference import MtpHead
from published_experts import experts_as_published
from safetensors.torch import save_file
from tiny_models import write_tiny_dflash
from transformers import (
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.settings.schema import Config
from skyrl_spec.types import TrainBatch

# Odd, so that the last shard is padded.
VOCAB_SIZE = 97
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MiMoForCausalLM")
# transformers' classes. MiMo's trunk is Qwen2's.
_CLASSES = {
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM),
    "Qwen3MoeForCausalLM": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "MiMoForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
}
NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2


def tiny_config(architecture: str, tied: bool, num_layers: int = 2) -> PreTrainedConfig:
    kind, _ = _CLASSES[architecture]
    experts = {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    }
    return kind(
        **(experts if kind is Qwen3MoeConfig else {}),
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )


def write_checkpoint(
    path: Path, architecture: str = "MiMoForCausalLM", *, tied: bool = False, seed: int = 0, num_layers: int = 2
) -> Path:
    """Writes random fp32 weights. Norms and biases are random too, so that a mix-up shows."""
    torch.manual_seed(seed)
    config = tiny_config(architecture, tied, num_layers)
    _, model_class = _CLASSES[architecture]
    weights = experts_as_published(model_class(config).state_dict())
    extra: dict[str, object] = {"architectures": [architecture], "rope_theta": 10000.0, "dtype": "float32"}
    if architecture == "MiMoForCausalLM":
        weights |= {f"model.mtp_layers.0.{name}": tensor for name, tensor in MtpHead(config).state_dict().items()}
        extra |= {"num_nextn_predict_layers": 1, "model_type": "qwen2", "attention_bias": True}
    if tied:
        del weights["lm_head.weight"]
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            weights[name] = (0.0 if name.endswith("bias") else 1.0) + 0.1 * torch.randn_like(tensor)
        elif "mtp_layers" in name:
            weights[name] = 0.1 * torch.randn_like(tensor)
        elif name.endswith("mlp.gate.weight"):
            # transformers' is zero. Logits are about 1.
            weights[name] = 0.1 * torch.randn_like(tensor)
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_dict() | extra))
    return path


def write_model(path: Path, draft: str, *, tied: bool = False, num_layers: int = 2, has_experts: bool = False) -> Path:
    """Writes a policy checkpoint for ``draft`` ("mtp" or "dflash"), and a DFlash draft next to it."""
    if draft == "mtp":
        return write_checkpoint(path, "MiMoForCausalLM", tied=tied, num_layers=num_layers)
    architecture = "Qwen3MoeForCausalLM" if has_experts else "Qwen3ForCausalLM"
    write_checkpoint(path, architecture, tied=tied, num_layers=num_layers)
    write_tiny_dflash(dflash_path(path), path, seed=0, target_layer_ids=list(range(num_layers)))
    return path


def dflash_path(model: Path) -> Path:
    return model.with_name("draft")


def make_config(
    path: Path,
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    ep: int = 1,
    expert_tp: int = 1,
    draft: str | None = "mtp",
    dtype: str = "fp32",
    distributed: bool = False,
    sequence_parallel: bool | None = False,
) -> Config:
    config = Config()
    trainer = config.trainer
    trainer.policy.model.path = str(path)
    trainer.policy.optimizer_config.lr = 1e-3
    # Far below actual gradient norms, so that clipping is active.
    trainer.policy.optimizer_config.max_grad_norm = 0.01
    trainer.policy.megatron_config.tensor_model_parallel_size = tp
    trainer.policy.megatron_config.context_parallel_size = cp
    trainer.policy.megatron_config.pipeline_model_parallel_size = pp
    trainer.policy.megatron_config.expert_model_parallel_size = ep
    trainer.policy.megatron_config.expert_tensor_parallel_size = expert_tp
    trainer.policy.megatron_config.dtype = dtype
    trainer.policy.megatron_config.use_distributed_optimizer = distributed
    trainer.policy.megatron_config.sequence_parallel = sequence_parallel
    trainer.placement.device = "cpu"
    trainer.mtp.positions_per_step = trainer.dflash.positions_per_step = 1.0
    trainer.mtp.enabled = draft == "mtp"
    trainer.mtp.loss_chunk_size = 16
    trainer.dflash.enabled = draft == "dflash"
    trainer.dflash.path = str(dflash_path(path))
    trainer.dflash.loss_chunk_size = 16
    # More than there are, so that all anchors are used.
    trainer.dflash.anchors_per_sequence = 1000
    trainer.logprobs_chunk_size = 16
    # Two or three of the rows of ``make_batch``.
    trainer.max_tokens_per_microbatch = 40
    return config


def make_pack(*documents: list[int], trained_from: int = 0) -> Pack:
    """Pack of these documents, trained on from the token of this index in each."""
    masks = [[index >= trained_from for index in range(len(document))] for document in documents]
    return pack_documents(np.concatenate(documents), np.concatenate(masks), [len(document) for document in documents])


def loss_mask_rows(pack: Pack) -> np.ndarray:
    """Loss mask of the documents of a pack as rows of a mini-batch, ``[documents, longest]``."""
    rows = np.zeros((len(pack.documents.lengths), pack.documents.longest), bool)
    for row, tokens in zip(rows, pack.documents.slices(), strict=True):
        row[: tokens.stop - tokens.start] = pack.loss_mask_T[tokens]
    return rows


def random_documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE - 1, length).tolist() for length in lengths]


def make_batch(seed: int, rows: int = 8) -> TrainBatch:
    """Rollouts of different lengths, determined by ``seed``. The fifth has no token to train on."""
    rng = np.random.default_rng(seed)
    return batch_of_lengths(rng, rng.integers(2, 9, rows), rng.integers(1, 14, rows), untrained_row=4)


def batch_of_lengths(
    rng: np.random.Generator,
    prompt_lengths: np.ndarray,
    response_lengths: np.ndarray,
    *,
    vocab_size: int = VOCAB_SIZE,
    untrained_row: int | None = None,
) -> TrainBatch:
    """Random rollouts with prompts and responses of these lengths, a row each."""
    rows, width = len(prompt_lengths), int((prompt_lengths + response_lengths).max())
    positions = np.arange(width)
    is_token = positions < (prompt_lengths + response_lengths)[:, None]
    loss_mask = is_token & (positions >= prompt_lengths[:, None])
    if untrained_row is not None:
        loss_mask[untrained_row] = False
    logprobs = np.where(loss_mask, -rng.random((rows, width)), 0.0).astype(np.float32)
    return TrainBatch(
        token_ids=np.where(is_token, rng.integers(2, vocab_size, (rows, width)), 0),
        lengths=prompt_lengths + response_lengths,
        loss_mask=loss_mask,
        loss_weights=token_weights(loss_mask, "token_mean", width),
        advantages=np.where(loss_mask, rng.standard_normal((rows, 1)), 0.0).astype(np.float32),
        rollout_logprobs=logprobs,
        policy_logprobs=logprobs - 0.01 * loss_mask.astype(np.float32),
    )
