"""Tiny models with random weights.

``write_tiny_model``: MiMo with its MTP head. ``write_tiny_qwen3`` and ``write_tiny_dflash``: a target, and its draft.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from published_experts import experts_as_published
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Odd on purpose: vLLM pads it.
VOCAB_SIZE = 97
HIDDEN_SIZE = 64
EOS_TOKEN = 1
MAX_POSITIONS = 512
MAX_MODEL_LEN = 320
PROMPT = [5, 17, 42, 8, 3]
# Longer than two cache blocks of vLLM on CPU (128 tokens each). With a draft the last cached block is computed again.
LONG_PROMPT = [(7 * index + 2) % (VOCAB_SIZE - 2) + 2 for index in range(300)]
MTP = {"method": "mtp", "num_speculative_tokens": 3}
BLOCK_SIZE = 4
MASK_TOKEN = VOCAB_SIZE - 1
ROPE_THETA = 10000.0
EXPERTS_PER_TOKEN = 2


def write_tiny_model(path: Path, seed: int, tied: bool = False) -> Path:
    """A MiMo model whose random weights make the next token depend mostly on the last one, which its head predicts."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2 if tied else 1.0)
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.25)
    weights = dict(model.state_dict())
    layer = {name: torch.randn_like(tensor) * 0.05 for name, tensor in model.model.layers[0].state_dict().items()}
    layer["input_proj.weight"] = torch.cat(
        [torch.randn(HIDDEN_SIZE, HIDDEN_SIZE) * 0.05, torch.eye(HIDDEN_SIZE)], dim=1
    )
    norms = ["token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm", "final_layernorm"]
    layer |= {f"{norm}.weight": 1 + 0.1 * torch.randn(HIDDEN_SIZE) for norm in norms}
    weights |= {f"model.mtp_layers.0.{name}": tensor for name, tensor in layer.items()}
    if tied:
        del weights["lm_head.weight"]
    extra = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, "attention_bias": True}
    _write(path, config.to_dict() | extra | {"model_type": "qwen2"}, weights)
    _write_tokenizer(path)
    return path


def write_tiny_qwen3(
    path: Path, seed: int, tied: bool = False, num_layers: int = 6, hidden_size: int = 64, *, has_experts: bool = False
) -> Path:
    """A Qwen3 target whose random weights make the next token depend mostly on the last one."""
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": EXPERTS_PER_TOKEN}
    experts |= {"moe_intermediate_size": 64, "norm_topk_prob": True}
    config = (Qwen3MoeConfig if has_experts else Qwen3Config)(
        **(experts if has_experts else {}),
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.03,
    )
    model = (Qwen3MoeForCausalLM if has_experts else Qwen3ForCausalLM)(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2 if tied else 1.0)
    model.model.embed_tokens.weight.data[MASK_TOKEN] *= 0.3
    for layer in model.model.layers if has_experts else ():
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.3)
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.4)
    weights = {name: _random_norm(name, tensor) for name, tensor in experts_as_published(model.state_dict()).items()}
    if tied:
        del weights["lm_head.weight"]
    _write(path, config.to_dict() | {"architectures": [type(model).__name__]}, weights)
    _write_tokenizer(path)
    return path


def write_tiny_dflash(
    path: Path,
    target: Path,
    seed: int,
    num_layers: int = 2,
    block_size: int = BLOCK_SIZE,
    target_layer_ids: Sequence[int] | None = None,
    **changes: Any,
) -> Path:
    """A DFlash draft for ``target`` whose random weights make it depend on the block's first token.

    The values of its first layer are mostly that token's and reach the output, less so with a longer context.
    ``changes``: entries of config.json to set.
    """
    torch.manual_seed(1000 + seed)
    of_target = json.loads((target / "config.json").read_text())
    depth, hidden_size = of_target["num_hidden_layers"], of_target["hidden_size"]
    layer_ids = list(target_layer_ids or default_target_layer_ids(depth, num_layers))
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": of_target["vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": 80,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        # Not the target's value, so that a test notices if one is used for the other.
        "rope_theta": 5000.0,
        "max_position_embeddings": of_target["max_position_embeddings"],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "block_size": block_size,
        "num_target_layers": depth,
        "dflash_config": {"mask_token_id": MASK_TOKEN, "target_layer_ids": layer_ids, "causal": False},
        **changes,
    }
    query_size, key_size = config["num_attention_heads"] * 32, config["num_key_value_heads"] * 32
    shapes = {
        "fc.weight": (hidden_size, len(layer_ids) * hidden_size),
        "hidden_norm.weight": (hidden_size,),
        "norm.weight": (hidden_size,),
    }
    for layer in range(num_layers):
        of_layer = {
            "input_layernorm": (hidden_size,),
            "post_attention_layernorm": (hidden_size,),
            "self_attn.q_proj": (query_size, hidden_size),
            "self_attn.k_proj": (key_size, hidden_size),
            "self_attn.v_proj": (key_size, hidden_size),
            "self_attn.o_proj": (hidden_size, query_size),
            "self_attn.q_norm": (32,),
            "self_attn.k_norm": (32,),
            "mlp.gate_proj": (config["intermediate_size"], hidden_size),
            "mlp.up_proj": (config["intermediate_size"], hidden_size),
            "mlp.down_proj": (hidden_size, config["intermediate_size"]),
        }
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    weights = {}
    for name, shape in shapes.items():
        std = 0.03 if name.startswith("layers.0.") else 0.1
        weights[name] = _random_norm(name, std * torch.randn(shape))
    weights["layers.0.self_attn.q_norm.weight"] *= 0.3
    weights["hidden_norm.weight"] *= 0.1
    mask = load_file(target / "model.safetensors")["model.embed_tokens.weight"][MASK_TOKEN]
    mask = torch.nn.functional.normalize(mask * weights["layers.0.input_layernorm.weight"], dim=0)
    weights["layers.0.self_attn.v_proj.weight"] += (torch.eye(hidden_size) - mask.outer(mask))[:key_size]
    values_to_hidden = torch.eye(hidden_size, key_size).unflatten(1, (-1, 32))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    weights["layers.0.self_attn.o_proj.weight"] += 10 * values_to_hidden.repeat_interleave(group, dim=1).flatten(1)
    _write(path, config, weights)
    return path


def write_tiny_eagle3(path: Path, target: Path, seed: int) -> Path:
    """An EAGLE-3 draft for ``target`` with random weights and the target's output head."""
    torch.manual_seed(2000 + seed)
    of_target, hidden_size, heads = json.loads((target / "config.json").read_text()), HIDDEN_SIZE, 2
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": of_target["vocab_size"],
        "draft_vocab_size": of_target["vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": of_target["max_position_embeddings"],
    }
    shapes = {
        "fc.weight": (hidden_size, 3 * hidden_size),
        "norm.weight": (hidden_size,),
        "midlayer.hidden_norm.weight": (hidden_size,),
        "midlayer.input_layernorm.weight": (hidden_size,),
        "midlayer.post_attention_layernorm.weight": (hidden_size,),
        **{f"midlayer.self_attn.{name}_proj.weight": (32 * heads, 2 * hidden_size) for name in "qkv"},
        "midlayer.self_attn.o_proj.weight": (hidden_size, 32 * heads),
        "midlayer.mlp.gate_proj.weight": (80, hidden_size),
        "midlayer.mlp.up_proj.weight": (80, hidden_size),
        "midlayer.mlp.down_proj.weight": (hidden_size, 80),
    }
    weights = {name: _random_norm(name, 0.1 * torch.randn(shape)) for name, shape in shapes.items()}
    weights["lm_head.weight"] = load_file(target / "model.safetensors")["lm_head.weight"]
    _write(path, config, weights)
    return path


def default_target_layer_ids(depth: int, num_ids: int) -> list[int]:
    """Layer ids spread evenly from layer 1 to the third last of ``depth`` layers."""
    if num_ids == 1:
        return [depth // 2]
    return [round(1 + index * (depth - 4) / (num_ids - 1)) for index in range(num_ids)]


def dflash(path: Path, num_speculative_tokens: int = BLOCK_SIZE - 1) -> dict[str, Any]:
    """vLLM's ``speculative_config`` of a DFlash draft."""
    return {"method": "dflash", "model": str(path), "num_speculative_tokens": num_speculative_tokens}


def _random_norm(name: str, tensor: Tensor) -> Tensor:
    return 1 + 0.1 * torch.randn_like(tensor) if name.endswith("norm.weight") else tensor


def _write(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    common = {"rope_theta": ROPE_THETA, "dtype": "float32", "eos_token_id": EOS_TOKEN, "bos_token_id": None}
    (path / "config.json").write_text(json.dumps(common | config))


def _write_tokenizer(path: Path) -> None:
    backend = Tokenizer(models.WordLevel({f"<{token}>": token for token in range(VOCAB_SIZE)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"<{EOS_TOKEN}>", unk_token="<0>").save_pretrained(path)


def split_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(target, draft) tensors of a tiny model."""
    weights = load_file(path / "model.safetensors")
    draft = {name: tensor for name, tensor in weights.items() if ".mtp_layers." in name}
    return {name: tensor for name, tensor in weights.items() if name not in draft}, draft
