"""The KL penalty to a reference policy, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_spec.algorithms.token_loss import MAX_LOG_RATIO


def kl_k3(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate ``exp(d) - d - 1`` of KL(policy || ref), with ``d = ref - policy``, on tokens the policy sampled.

    Elementwise, unbiased and never negative. Only ``policy_logprobs`` gets a gradient.

    Source: Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = (ref_logprobs.detach() - policy_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1 is accurate for small d. The clamp removes rounding errors below zero.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0)
