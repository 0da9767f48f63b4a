"""The KL penalty to a reference policy, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

# exp of +-20 is far outside every clip and far inside float32.
MAX_LOG_RATIO = 20.0


def kl_k3(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || ref) on tokens the policy sampled: ``exp(d) - d - 1``, ``d = ref - policy``.

    Elementwise, never negative, unbiased. Gradient reaches ``policy_logprobs`` only.

    Source: Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = (ref_logprobs.detach() - policy_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1 keeps the digits of a small d; the clamp removes a rounding error below zero.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0)
