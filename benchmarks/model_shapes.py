"""``config.json`` of the models of the recipes, as far as their shapes need it. Imports nothing."""

from __future__ import annotations

from typing import Any

_OF_BOTH: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
MIMO_7B: dict[str, Any] = _OF_BOTH | {
    "architectures": ["MiMoForCausalLM"],
    "vocab_size": 151_680,
    "intermediate_size": 11_008,
    "num_nextn_predict_layers": 1,
    "attention_bias": True,
}
QWEN3_8B: dict[str, Any] = _OF_BOTH | {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "intermediate_size": 12_288,
}
QWEN3_32B: dict[str, Any] = QWEN3_8B | {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 25_600,
}
QWEN3_30B_A3B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "intermediate_size": 6_144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
