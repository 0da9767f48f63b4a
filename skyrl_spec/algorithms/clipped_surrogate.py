"""The clipped objective of PPO, GRPO and DAPO, token by token (``policy_loss_type=regular``)."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_spec.algorithms.token_loss import PolicyTokenLoss, exp_log_ratio, pessimistic


def clipped_surrogate(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    eps_clip_low: float,
    eps_clip_high: float,
    clip_ratio_c: float | None,
) -> PolicyTokenLoss:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)`` with ``r = exp(policy - old)``.

    Dual clip (``clip_ratio_c`` = c > 1): the loss of a token with A < 0 is ``min(loss, c |A|)``.

    All tensors have the same shape, [T] or [B, S]. Nothing is reduced. Only ``policy_logprobs`` gets a gradient, and
    only from tokens whose |log-ratio| is at most 20.

    Source: PPO (arXiv:1707.06347), dual clip (arXiv:1912.09729), clip-higher (DAPO, arXiv:2503.14476).
    """
    old_logprobs = old_logprobs.detach()
    advantages = advantages.detach()
    loss, clipped = pessimistic(exp_log_ratio(policy_logprobs, old_logprobs), advantages, eps_clip_low, eps_clip_high)
    if clip_ratio_c is not None:
        bound = clip_ratio_c * advantages.abs()
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        clipped = clipped | bounded
    return PolicyTokenLoss(loss, clipped)
