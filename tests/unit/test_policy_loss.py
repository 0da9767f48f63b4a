"""Clipped surrogate and k3 against scalar arithmetic in float64 and autograd of the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from skyrl_spec.algorithms.clipped_surrogate import policy_token_loss
from skyrl_spec.algorithms.kl import kl_k3

LOW, HIGH = 0.2, 0.28


def loss_by_hand(logprob: float, old: float, advantage: float, c: float | None, tis: float) -> float:
    ratio = math.exp(logprob - old)
    loss = -min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
    if c is not None and advantage < 0:
        loss = min(loss, c * abs(advantage))
    return loss * tis


def random_tokens(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    policy, old, rollout, advantages = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), old, rollout, advantages


@pytest.mark.parametrize("shape", [(1,), (97,), (5, 13)])
@pytest.mark.parametrize("c", [None, 3.0])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_loss_equals_scalar_arithmetic(shape: tuple[int, ...], c: float | None, cap: float | None) -> None:
    policy, old, rollout, advantages = random_tokens(*shape)
    result = policy_token_loss(
        policy,
        old,
        advantages,
        eps_clip_low=LOW,
        eps_clip_high=HIGH,
        clip_ratio_c=c,
        rollout_logprobs=rollout,
        tis_imp_ratio_cap=cap,
    )
    tis = torch.ones(shape) if cap is None else (old - rollout).exp().clamp(max=cap)
    values = zip(policy.flatten(), old.flatten(), advantages.flatten(), tis.flatten(), strict=True)
    expected = torch.tensor([loss_by_hand(p.item(), o.item(), a.item(), c, t.item()) for p, o, a, t in values])
    assert result.loss.shape == shape
    torch.testing.assert_close(result.loss.flatten(), expected.double(), rtol=1e-6, atol=1e-6)


def test_gradient_is_ratio_times_advantage_and_zero_where_clipped() -> None:
    policy, old, rollout, advantages = random_tokens(997)
    old.requires_grad_()
    result = policy_token_loss(
        policy, old, advantages, eps_clip_low=LOW, eps_clip_high=HIGH, clip_ratio_c=3.0,
        rollout_logprobs=rollout, tis_imp_ratio_cap=2.0,
    )  # fmt: skip
    result.loss.sum().backward()
    ratio = (policy - old).exp()
    tis = (old - rollout).exp().clamp(max=2.0)
    torch.testing.assert_close(policy.grad, torch.where(result.clipped, 0.0, -ratio * advantages * tis).detach())
    assert old.grad is None
    above = (advantages > 0) & (ratio > 1 + HIGH)
    below = (advantages < 0) & ((ratio < 1 - LOW) | (ratio > 3.0))
    assert torch.equal(result.clipped, above | below)
    assert above.any()
    assert below.any()


def test_on_policy_loss_is_minus_the_advantage() -> None:
    policy, _, _, advantages = random_tokens(31)
    result = policy_token_loss(
        policy, policy.detach(), advantages, eps_clip_low=LOW, eps_clip_high=HIGH, clip_ratio_c=None
    )
    assert torch.equal(result.loss, -advantages)
    assert not result.clipped.any()


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_extreme_ratios_stay_finite(gap: float) -> None:
    policy = torch.zeros(2, requires_grad=True)
    result = policy_token_loss(
        policy, torch.full((2,), gap), torch.tensor([1.0, -1.0]), eps_clip_low=LOW, eps_clip_high=HIGH,
        clip_ratio_c=None, rollout_logprobs=torch.full((2,), -gap), tis_imp_ratio_cap=2.0,
    )  # fmt: skip
    (result.loss.sum() + kl_k3(policy, torch.full((2,), gap)).sum()).backward()
    assert result.loss.isfinite().all()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_importance_cap_without_rollout_logprobs_is_refused() -> None:
    policy, old, _, advantages = random_tokens(3)
    with pytest.raises(AssertionError, match="rollout's log-probs"):
        policy_token_loss(
            policy, old, advantages, eps_clip_low=LOW, eps_clip_high=HIGH, clip_ratio_c=None, tis_imp_ratio_cap=2.0
        )


def test_k3_is_the_formula_and_never_negative() -> None:
    policy, ref, _, _ = random_tokens(97)
    kl = kl_k3(policy, ref)
    torch.testing.assert_close(kl, (ref - policy).exp() - (ref - policy) - 1, rtol=1e-9, atol=1e-12)
    kl.sum().backward()
    torch.testing.assert_close(policy.grad, (1 - (ref - policy).exp()).detach())
    tiny = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * 1e-5
    assert (kl_k3(torch.zeros_like(tiny), tiny) >= 0).all()


def test_k3_estimates_the_kl_of_two_distributions_without_bias() -> None:
    policy_logits, ref_logits = torch.randn(2, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    policy, ref = policy_logits.log_softmax(0), ref_logits.log_softmax(0)
    estimate = (policy.exp() * kl_k3(policy, ref)).sum()
    torch.testing.assert_close(estimate, (policy.exp() * (policy - ref)).sum(), rtol=1e-9, atol=1e-12)
