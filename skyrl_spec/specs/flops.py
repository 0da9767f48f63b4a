"""Floating-point operations of training, counted from shapes. A product and the sum that takes it are two.

Only matrix products and attention count. Norms, rotary embeddings, softmaxes and the optimizer are bound by memory.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_spec.specs.model import ModelSpec

# Passes over a layer: forward, and backward for inputs and weights.
TRAINED = 3
# The backward pass of attention has five products where the forward pass has two.
ATTENTION_TRAINED = 3.5


@dataclass(frozen=True)
class Flops:
    """Operations of matrix products and of attention."""

    products: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.attention + other.attention)

    @property
    def total(self) -> float:
        return self.products + self.attention


def linear(num_tokens: float, num_in: int, num_out: int) -> float:
    """Operations of a matrix product's forward pass."""
    return 2.0 * num_tokens * num_in * num_out


def layer(spec: ModelSpec, num_tokens: float) -> float:
    """Operations of all matrix products of a transformer layer in its forward pass."""
    query, hidden = spec.num_heads * spec.head_dim, spec.hidden_size
    return (
        linear(num_tokens, hidden, query)
        + key_value(spec, num_tokens)
        + linear(num_tokens, query, hidden)
        + linear(num_tokens, hidden, 3 * spec.num_active_ffn)
        + (0.0 if spec.experts is None else linear(num_tokens, hidden, spec.experts.num))
    )


def key_value(spec: ModelSpec, num_tokens: float) -> float:
    """Operations that compute a layer's keys and values in its forward pass."""
    return linear(num_tokens, spec.hidden_size, 2 * spec.num_kv_heads * spec.head_dim)


def attention(spec: ModelSpec, num_pairs: float) -> float:
    """Operations of a layer's attention in its forward pass.

    Args:
        num_pairs: pairs of a query and a key that it sees.
    """
    return 4.0 * num_pairs * spec.num_heads * spec.head_dim


def head(spec: ModelSpec, num_tokens: float) -> float:
    """Operations that compute the logits of tokens."""
    return linear(num_tokens, spec.hidden_size, spec.vocab_size)


def policy_training(spec: ModelSpec, prompt: int, response: int) -> Flops:
    """Operations of a policy's training on one document, without what recompute does again."""
    tokens = prompt + response
    return Flops(
        # The backward pass of the head computes the logits again.
        TRAINED * spec.num_layers * layer(spec, tokens) + (TRAINED + 1) * head(spec, response),
        ATTENTION_TRAINED * spec.num_layers * attention(spec, tokens * (tokens + 1) / 2),
    )
