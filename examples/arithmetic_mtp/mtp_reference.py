"""MiMo's MTP head in plain PyTorch, unrolled as vLLM serves it. Used to make the tiny model, and by the tests
as the independent reference of the Megatron draft.

Shapes: B batch, S sequence, D hidden, H heads, K draft depth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)


class MtpHead(nn.Module):
    """One MTP layer; parameter names below ``model.mtp_layers.0.`` of a MiMo checkpoint."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        layer = Qwen2DecoderLayer(config, layer_idx=0)
        self.token_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self.final_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Qwen2RotaryEmbedding(config)
        self.groups = config.num_attention_heads // config.num_key_value_heads

    def forward(self, hidden_BSD: Tensor, embeds_BSD: Tensor, num_depths: int) -> list[Tensor]:
        """Output (after the final norm) of each depth; entry ``[:, t]`` of depth d drafts token ``t + d + 1``.

        ``hidden_BSD`` is the trunk's output before its final norm; ``embeds_BSD`` the token embeddings of the
        same positions. Entries whose token ``t + d`` lies past the end are garbage and must be masked.
        """
        seq_len = hidden_BSD.shape[1]
        index_S = torch.arange(seq_len, device=hidden_BSD.device)
        causal_SS = index_S[None, :] <= index_S[:, None]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs: list[Tensor] = []
        for depth in range(1, num_depths + 1):
            # The embedding of token t+d; position t+d-1 == 0 happens at depth 1 alone, and is zeroed there.
            embeds = torch.roll(embeds_BSD, -depth, dims=1)
            if depth == 1:
                embeds = torch.where(index_S[None, :, None] == 0, 0.0, embeds)
            x = self.input_proj(torch.cat([self.hidden_layernorm(hidden_BSD), self.token_layernorm(embeds)], dim=-1))
            q, k, v = self._qkv(self.input_layernorm(x), index_S + depth - 1)
            keys.append(k)
            values.append(v)
            scores = (q @ keys[0].transpose(-1, -2)).masked_fill(~causal_SS, -torch.inf)
            chain = [(q * key).sum(-1, keepdim=True) for key in keys[1:]]
            probs = torch.softmax(torch.cat([scores, *chain], dim=-1) * q.shape[-1] ** -0.5, dim=-1)
            attended = probs[..., :seq_len] @ values[0]
            for slot, value in enumerate(values[1:]):
                attended = attended + probs[..., seq_len + slot, None] * value
            x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
            x = x + self.mlp(self.post_attention_layernorm(x))
            hidden_BSD = self.final_layernorm(x)
            outputs.append(hidden_BSD)
        return outputs

    def _qkv(self, x_BSD: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn, (batch, seq_len, _) = self.self_attn, x_BSD.shape
        q, k, v = (
            proj(x_BSD).view(batch, seq_len, -1, attn.head_dim).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        cos, sin = self.rotary(x_BSD, positions_S[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, repeat_kv(k, self.groups), repeat_kv(v, self.groups)
