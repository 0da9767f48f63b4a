"""What all policy objectives share: ratios of probabilities, importance weights, and the form of the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) and exp(-20) are far outside every clip and well inside the range of float32.
MAX_LOG_RATIO = 20.0


class PolicyTokenLoss(NamedTuple):
    """Loss per token. ``loss``: to be minimised, differentiable. ``clipped``: bool, whether a clip bounds the loss."""

    loss: Tensor
    clipped: Tensor


def exp_log_ratio(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """``exp(logprobs - base)``. A ratio beyond ``exp(20)`` either way is that, and has no gradient."""
    return (logprobs - base_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def pessimistic(ratio: Tensor, advantages: Tensor, eps_clip_low: float, eps_clip_high: float) -> PolicyTokenLoss:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)``, the objective of PPO for any kind of ratio r.

    Source: PPO (arXiv:1707.06347); two bounds: clip-higher (DAPO, arXiv:2503.14476).
    """
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1 - eps_clip_low, 1 + eps_clip_high) * advantages
    return PolicyTokenLoss(-torch.minimum(surrogate, clipped_surrogate), clipped_surrogate < surrogate)


def truncated_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Weights ``min(exp(old - rollout), cap)`` without a gradient, for tokens that another policy sampled.

    They correct for differences between the probabilities of the engine, which sampled, and of the trainer.

    Source: truncated importance sampling for rollout engines (Yao et al. 2025).
    """
    return exp_log_ratio(old_logprobs.detach(), rollout_logprobs.detach()).clamp(max=cap)
