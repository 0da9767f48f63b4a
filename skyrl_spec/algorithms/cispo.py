"""CISPO: clipped importance weights on the policy gradient of every token (``policy_loss_type=cispo``)."""

from __future__ import annotations

from torch import Tensor

from skyrl_spec.algorithms.token_loss import PolicyTokenLoss, exp_log_ratio


def cispo(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, eps_clip_low: float, eps_clip_high: float
) -> PolicyTokenLoss:
    """``-clip(r, 1 - low, 1 + high) A policy`` with ``r = exp(policy - old)``, whose clipped ratio has no gradient.

    A clip bounds a token's weight. It does not silence the token, as that of the clipped surrogate does. ``low=1`` is
    no lower bound, as in the paper.

    All tensors have the same shape. Nothing is reduced. Only ``policy_logprobs`` gets a gradient.

    Source: MiniMax-M1 (arXiv:2506.13585), equations 4 and 5.
    """
    ratio = exp_log_ratio(policy_logprobs.detach(), old_logprobs.detach())
    weight = ratio.clamp(1 - eps_clip_low, 1 + eps_clip_high)
    return PolicyTokenLoss(-weight * advantages.detach() * policy_logprobs, weight != ratio)
