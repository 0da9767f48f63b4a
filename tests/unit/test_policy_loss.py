"""Policy objectives and k3 against scalar arithmetic in float64 and autograd of the plain formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from skyrl_spec.algorithms.cispo import cispo
from skyrl_spec.algorithms.clipped_surrogate import clipped_surrogate
from skyrl_spec.algorithms.gspo import gspo
from skyrl_spec.algorithms.kl import kl_k3
from skyrl_spec.algorithms.policy_loss import POLICY_LOSSES, ResponseTokens
from skyrl_spec.algorithms.token_loss import truncated_importance
from skyrl_spec.losses.logprobs import TokenLogprobs
from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.settings.algorithm import AlgorithmConfig
from skyrl_spec.settings.allowed import POLICY_LOSS_TYPES
from skyrl_spec.training.step import build_micro, policy_loss
from skyrl_spec.types import TrainBatch

LOW, HIGH = 0.2, 0.28


def loss_by_hand(logprob: float, old: float, advantage: float, c: float | None) -> float:
    ratio = math.exp(logprob - old)
    loss = -min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
    if c is not None and advantage < 0:
        loss = min(loss, c * abs(advantage))
    return loss


def random_tokens(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    policy, old, rollout, advantages = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), old, rollout, advantages


@pytest.mark.parametrize("shape", [(1,), (97,), (5, 13)])
@pytest.mark.parametrize("c", [None, 3.0])
def test_loss_equals_scalar_arithmetic(shape: tuple[int, ...], c: float | None) -> None:
    policy, old, _, advantages = random_tokens(*shape)
    result = clipped_surrogate(policy, old, advantages, eps_clip_low=LOW, eps_clip_high=HIGH, clip_ratio_c=c)
    values = zip(policy.flatten(), old.flatten(), advantages.flatten(), strict=True)
    expected = torch.tensor([loss_by_hand(p.item(), o.item(), a.item(), c) for p, o, a in values])
    assert result.loss.shape == shape
    torch.testing.assert_close(result.loss.flatten(), expected.double(), rtol=1e-6, atol=1e-6)


def test_gradient_is_ratio_times_advantage_and_zero_where_clipped() -> None:
    policy, old, _, advantages = random_tokens(997)
    old.requires_grad_()
    result = clipped_surrogate(policy, old, advantages, eps_clip_low=LOW, eps_clip_high=HIGH, clip_ratio_c=3.0)
    result.loss.sum().backward()
    ratio = (policy - old).exp()
    torch.testing.assert_close(policy.grad, torch.where(result.clipped, 0.0, -ratio * advantages).detach())
    assert old.grad is None
    above = (advantages > 0) & (ratio > 1 + HIGH)
    below = (advantages < 0) & ((ratio < 1 - LOW) | (ratio > 3.0))
    assert torch.equal(result.clipped, above | below)
    assert above.any()
    assert below.any()


def test_on_policy_loss_is_minus_the_advantage() -> None:
    policy, _, _, advantages = random_tokens(31)
    result = clipped_surrogate(
        policy, policy.detach(), advantages, eps_clip_low=LOW, eps_clip_high=HIGH, clip_ratio_c=None
    )
    assert torch.equal(result.loss, -advantages)
    assert not result.clipped.any()


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_extreme_ratios_stay_finite(gap: float) -> None:
    policy, old, advantages = torch.zeros(2, requires_grad=True), torch.full((2,), gap), torch.tensor([1.0, -1.0])
    clips = {"eps_clip_low": LOW, "eps_clip_high": HIGH}
    losses = [
        clipped_surrogate(policy, old, advantages, clip_ratio_c=None, **clips).loss,
        gspo(policy, old, advantages, torch.tensor([0, 1]), torch.tensor([1, 1]), **clips).loss,
        cispo(policy, old, advantages, **clips).loss,
        kl_k3(policy, old),
    ]
    weights = truncated_importance(old, torch.full((2,), -gap), cap=2.0)
    total = sum(((loss * weights).sum() for loss in losses), torch.zeros(()))
    total.backward()
    assert total.isfinite()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_importance_weights_equal_scalar_arithmetic_and_have_no_gradient() -> None:
    _, old, rollout, _ = random_tokens(97)
    weights = truncated_importance(old.requires_grad_(), rollout, cap=1.5)
    expected = [min(math.exp(o - r), 1.5) for o, r in zip(old.tolist(), rollout.tolist(), strict=True)]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert not weights.requires_grad
    assert 0 < (weights == 1.5).sum() < 97


def responses_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    lengths_R = torch.tensor(lengths)
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths_R), lengths_R


def test_gspo_equals_scalar_arithmetic_and_its_gradient_the_papers() -> None:
    lengths = [1, 40, 0, 7, 23]
    response_N, lengths_R = responses_of(lengths)
    policy, old, _, _ = random_tokens(sum(lengths))
    advantage_R = torch.tensor([1.0, -0.5, 3.0, 2.0, -1.5], dtype=torch.float64)
    advantages = advantage_R[response_N]
    # The published clips are narrower; these leave some responses inside and some outside.
    result = gspo(policy, old, advantages, response_N, lengths_R, eps_clip_low=LOW, eps_clip_high=HIGH)
    # Equation 5: the mean over responses of -min(s A, clip(s) A), with autograd through s.
    plain = policy.detach().clone().requires_grad_()
    terms, clipped = [], []
    for first, length, advantage in zip(np.cumsum([0, *lengths[:-1]]), lengths, advantage_R.tolist(), strict=True):
        if length:
            ratio = (plain[first : first + length] - old[first : first + length]).mean().exp()
            both = ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage
            terms.append(-torch.minimum(*both))
            clipped += [bool(both[1] < both[0])] * length
    expected = torch.stack(terms).mean()
    expected.backward()
    weights = 1 / (4 * lengths_R[response_N].double())
    loss = (weights * result.loss).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(policy.grad, plain.grad)
    assert result.clipped.tolist() == clipped
    assert 0 < sum(clipped) < len(clipped)


@pytest.mark.parametrize("low", [LOW, 1.0])
def test_cispo_equals_scalar_arithmetic_and_silences_no_token(low: float) -> None:
    policy, old, _, advantages = random_tokens(97)
    result = cispo(policy, old, advantages, eps_clip_low=low, eps_clip_high=HIGH)
    result.loss.sum().backward()
    triples = list(zip(policy.tolist(), old.tolist(), advantages.tolist(), strict=True))
    weights = [min(max(math.exp(p - o), 1 - low), 1 + HIGH) for p, o, _ in triples]
    losses = [-weight * a * p for weight, (p, _, a) in zip(weights, triples, strict=True)]
    gradients = [-weight * a for weight, (_, _, a) in zip(weights, triples, strict=True)]
    torch.testing.assert_close(result.loss, torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(policy.grad, torch.tensor(gradients, dtype=torch.float64))
    assert 0 < result.clipped.sum() < 97
    ratio = (policy - old).exp()
    assert torch.equal(result.clipped, (ratio > 1 + HIGH) | (ratio < 1 - low))


def test_with_ratios_of_1_all_objectives_have_one_gradient() -> None:
    response_N, lengths_R = responses_of([3, 9, 5])
    values, _, _, advantages = random_tokens(17)
    gradients = []
    for objective in POLICY_LOSSES.values():
        policy = values.detach().clone().requires_grad_()
        tokens = ResponseTokens(policy, policy.detach(), advantages, response_N, lengths_R)
        objective(tokens, AlgorithmConfig()).loss.sum().backward()
        gradients.append(policy.grad)
    for gradient in gradients:
        torch.testing.assert_close(gradient, -advantages, rtol=1e-12, atol=0)


def test_objectives_are_those_of_the_settings() -> None:
    assert tuple(POLICY_LOSSES) == POLICY_LOSS_TYPES


def test_anchored_on_rollouts_the_ratio_is_to_what_was_sampled() -> None:
    rng = np.random.default_rng(1)
    mask_BS = np.ones((3, 7), bool)
    mask_BS[:, :2] = False
    advantages, rollout, old, new = (rng.normal(size=mask_BS.shape) * mask_BS for _ in range(4))
    batch = TrainBatch(
        token_ids=rng.integers(0, 50, mask_BS.shape), lengths=np.full(3, 7), loss_mask=mask_BS,
        loss_weights=token_weights(mask_BS, "token_mean", 7), advantages=advantages, rollout_logprobs=rollout,
        policy_logprobs=old,
    )  # fmt: skip
    tokens = TokenLogprobs(torch.from_numpy(new[mask_BS]), torch.zeros(15, dtype=torch.float64))

    def loss(batch: TrainBatch, anchor: str) -> float:
        return float(policy_loss(tokens, build_micro(batch, np.arange(3)), AlgorithmConfig(), anchor=anchor)[0])

    def naive(anchor_BS: np.ndarray) -> float:
        ratio_BS = np.exp(new - anchor_BS)
        objective_BS = np.minimum(ratio_BS * advantages, np.clip(ratio_BS, 0.8, 1.2) * advantages)
        return -objective_BS[mask_BS].mean()

    assert loss(batch, "rollout") == pytest.approx(naive(rollout), rel=1e-6)
    assert loss(batch, "old") == pytest.approx(naive(old), rel=1e-6)
    # It needs no others.
    assert loss(replace(batch, policy_logprobs=None), "rollout") == loss(batch, "rollout")


@pytest.mark.parametrize("name", POLICY_LOSS_TYPES)
@pytest.mark.parametrize("use_tis", [False, True])
def test_packs_add_up_to_documents_one_by_one(name: str, use_tis: bool) -> None:
    """Prompts, observations inside a response, a response that is not trained on, and packs of any size."""
    rng = np.random.default_rng(0)
    mask_BS = rng.random((9, 24)) < 0.6
    lengths_B = rng.integers(4, 25, 9)
    mask_BS &= (np.arange(24) < lengths_B[:, None]) & (np.arange(24) > 1)
    mask_BS[3] = False
    values = [np.where(mask_BS, rng.normal(size=mask_BS.shape), 0).astype(np.float32) for _ in range(4)]
    batch = TrainBatch(
        token_ids=rng.integers(0, 50, mask_BS.shape), lengths=lengths_B, loss_mask=mask_BS,
        loss_weights=token_weights(mask_BS, "sequence_mean", 24), advantages=values[0], rollout_logprobs=values[1],
        policy_logprobs=values[2],
    )  # fmt: skip
    algorithm = AlgorithmConfig(policy_loss_type=name)

    def of(packs: list[list[int]]) -> tuple[np.ndarray, Tensor]:
        sums, gradients = np.zeros(5), torch.zeros(mask_BS.shape)
        for rows in packs:
            micro = build_micro(batch, np.array(rows, int))
            logprobs = torch.from_numpy(values[3][rows][mask_BS[rows]]).requires_grad_()
            loss, found = policy_loss(
                TokenLogprobs(logprobs, torch.zeros_like(logprobs)), micro, algorithm, has_tis=use_tis
            )
            loss.backward()
            sums += found.numpy()
            assert logprobs.grad is not None
            of_rows = torch.zeros(len(rows), 24)
            of_rows[torch.from_numpy(mask_BS[rows])] = logprobs.grad
            gradients[rows] = of_rows
        return sums, gradients

    one_by_one = of([[row] for row in range(9)])
    for packs in ([list(range(9))], [[8, 2, 3], [0, 1], [], [7, 6, 5, 4]]):
        sums, gradients = of(packs)
        np.testing.assert_allclose(sums, one_by_one[0], rtol=1e-6)
        torch.testing.assert_close(gradients, one_by_one[1], rtol=1e-6, atol=1e-9)


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
