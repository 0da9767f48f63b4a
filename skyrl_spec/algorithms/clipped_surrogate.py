"""The clipped policy objective per token. ``losses.reduce.token_weights`` turns it into a scalar loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skyrl_spec.algorithms.kl import MAX_LOG_RATIO


class PolicyTokenLoss(NamedTuple):
    """Loss per token. ``loss``: to be minimised, differentiable. ``clipped``: bool, whether a clip bounds the loss."""

    loss: Tensor
    clipped: Tensor


def policy_token_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    eps_clip_low: float,
    eps_clip_high: float,
    clip_ratio_c: float | None,
    rollout_logprobs: Tensor | None = None,
    tis_imp_ratio_cap: float | None = None,
) -> PolicyTokenLoss:
    """Clipped surrogate ``-min(r A, clip(r, 1 - low, 1 + high) A)`` with ``r = exp(policy - old)``.

    - Dual clip (``clip_ratio_c`` = c > 1): the loss of a token with A < 0 is ``min(loss, c |A|)``.
    - Truncated importance sampling (``tis_imp_ratio_cap``): the loss is multiplied by ``min(exp(old - rollout), cap)``.
      This corrects for differences between the probabilities of the engine, which sampled, and of the trainer.

    All tensors have the same shape, [T] or [B, S]. Nothing is reduced. Only ``policy_logprobs`` gets a gradient, and
    only from tokens whose |log-ratio| is at most 20.

    Source: PPO (arXiv:1707.06347), dual clip (arXiv:1912.09729), clip-higher (DAPO, arXiv:2503.14476), truncated
    importance sampling for rollout engines (Yao et al. 2025).
    """
    old_logprobs = old_logprobs.detach()
    advantages = advantages.detach()
    ratio = _exp_log_ratio(policy_logprobs, old_logprobs)
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1 - eps_clip_low, 1 + eps_clip_high) * advantages
    loss = -torch.minimum(surrogate, clipped_surrogate)
    clipped = clipped_surrogate < surrogate
    if clip_ratio_c is not None:
        bound = clip_ratio_c * advantages.abs()
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        clipped = clipped | bounded
    if tis_imp_ratio_cap is not None:
        assert rollout_logprobs is not None, "truncated importance sampling needs the rollout's log-probs"
        loss = loss * _exp_log_ratio(old_logprobs, rollout_logprobs.detach()).clamp(max=tis_imp_ratio_cap)
    return PolicyTokenLoss(loss, clipped)


def _exp_log_ratio(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    return (logprobs - base_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
