"""GSPO: the clipped objective with one ratio for a whole response (``policy_loss_type=gspo``)."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_spec.algorithms.token_loss import MAX_LOG_RATIO, PolicyTokenLoss, pessimistic


def gspo(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_N: Tensor,
    lengths_R: Tensor,
    *,
    eps_clip_low: float,
    eps_clip_high: float,
) -> PolicyTokenLoss:
    """``-min(s A, clip(s, 1 - low, 1 + high) A)`` with the response's ratio ``s = exp(mean(policy - old))``.

    Each token has the value of its response's ratio, and the gradient ``s * grad(policy)`` of its own log-prob. The
    mean over the tokens of a response is then GSPO's loss of the response: it belongs with
    ``loss_reduction=sequence_mean``.

    Args:
        policy_logprobs: ``[N]``, the tokens of a response one after the other. Only these get a gradient.
        response_N: index of each token's response.
        lengths_R: number of tokens of each response.

    Source: GSPO (arXiv:2507.18071), equations 7 and 14.
    """
    log_ratio_N = (policy_logprobs - old_logprobs).detach()
    # Sums in a fixed order, on a GPU too.
    mean_R = torch.segment_reduce(log_ratio_N, "mean", lengths=lengths_R, unsafe=True)
    ratio_N = mean_R[response_N].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    # 1, with the gradient of the log-prob.
    gradient_N = (policy_logprobs - policy_logprobs.detach()).exp()
    return pessimistic(ratio_N * gradient_N, advantages.detach(), eps_clip_low, eps_clip_high)
