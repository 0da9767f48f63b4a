"""Advantages and DAPO's overlong punishment against values computed by hand and by a plain loop."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from skyrl_spec.algorithms.advantages import (
    ESTIMATORS,
    batch_advantages,
    build_estimator,
    group_advantages,
    leave_one_out_advantages,
    overlong_penalty,
)
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.algorithm import AlgorithmConfig
from skyrl_spec.settings.allowed import ADVANTAGE_ESTIMATORS


def test_group_by_hand() -> None:
    # Mean 0.5; unbiased standard deviation sqrt(4 * 0.25 / 3).
    rewards_PG = np.array([[1.0, 0.0, 1.0, 0.0]])
    expected = 0.5 / ((1 / 3) ** 0.5 + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards_PG, norm_by_std=True), [[expected, -expected] * 2], rtol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards_PG, norm_by_std=False), [[0.5, -0.5] * 2], rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_groups_against_a_plain_loop(norm_by_std: bool) -> None:
    rewards_PG = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    expected = []
    for group in rewards_PG.astype(float).tolist():
        std = statistics.stdev(group) + 1e-6 if norm_by_std else 1.0
        expected.append([(reward - statistics.fmean(group)) / std for reward in group])
    found = group_advantages(rewards_PG, norm_by_std)
    # The same sums in another order, in float64.
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-9)


def test_equal_rewards_and_groups_of_one() -> None:
    equal = group_advantages(np.full((2, 8), 0.1), norm_by_std=True)
    # The mean of 0.1s has a rounding error of 1e-17, which is divided by 1e-6.
    np.testing.assert_allclose(equal, 0, atol=1e-10)
    rewards_P1 = np.array([[0.3], [1.0]])
    np.testing.assert_array_equal(group_advantages(rewards_P1, norm_by_std=True), rewards_P1)


def test_leave_one_out_against_a_plain_loop() -> None:
    rewards_PG = np.random.default_rng(1).normal(size=(6, 4))
    expected = [
        [reward - statistics.fmean(group[:index] + group[index + 1 :]) for index, reward in enumerate(group)]
        for group in rewards_PG.tolist()
    ]
    np.testing.assert_allclose(leave_one_out_advantages(rewards_PG), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(leave_one_out_advantages(np.array([[1.0, 0.0]])), [[1.0, -1.0]])


def test_batch_advantages_against_a_list_of_all_tokens() -> None:
    rng = np.random.default_rng(2)
    rewards_PG, lengths_PG = rng.normal(size=(5, 3)), rng.integers(0, 40, (5, 3))
    tokens = [r for r, length in zip(rewards_PG.flat, lengths_PG.flat, strict=True) for _ in range(length)]
    mean, std = statistics.fmean(tokens), statistics.pstdev(tokens)
    np.testing.assert_allclose(
        batch_advantages(rewards_PG, lengths_PG), (rewards_PG - mean) / (std + 1e-6), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_array_equal(batch_advantages(np.ones((2, 2)), np.full((2, 2), 4)), np.zeros((2, 2)))
    np.testing.assert_array_equal(batch_advantages(np.zeros((2, 2)), np.zeros((2, 2), int)), np.zeros((2, 2)))


def test_overlong_penalty_by_hand() -> None:
    lengths = np.array([1, 80, 85, 90, 100, 120])
    np.testing.assert_allclose(
        overlong_penalty(lengths, max_generate_length=100, buffer_len=20, penalty_factor=0.5),
        [0, 0, -0.125, -0.25, -0.5, -0.5],
        atol=1e-15,
    )
    np.testing.assert_array_equal(overlong_penalty(lengths, 100, buffer_len=0, penalty_factor=1.0), np.zeros(6))


def test_estimators_are_built_by_name() -> None:
    rewards_PG = np.array([[0.0, 2.0]])
    for norm_by_std in (True, False):
        estimate = build_estimator(AlgorithmConfig(grpo_norm_by_std=norm_by_std))
        found = estimate(rewards_PG, np.ones((1, 2), int))
        np.testing.assert_array_equal(found, group_advantages(rewards_PG, norm_by_std))
    assert tuple(ESTIMATORS) == ADVANTAGE_ESTIMATORS
    with pytest.raises(ConfigError, match=r"^trainer\.algorithm\.advantage_estimator=gae: must be grpo or rloo"):
        build_estimator(AlgorithmConfig(advantage_estimator="gae"))
