"""The doctor's chi-square test: right for sequences that occur as often as their log-probs say, and only for these."""

from __future__ import annotations

import math

import numpy as np
import pytest

from skyrl_spec.doctor.exactness import LENGTH, NUM_RESPONSES, SLICE, chi_square
from skyrl_spec.types import Generation, Versions


def responses(probs: np.ndarray, said: np.ndarray, seed: int, number: int = NUM_RESPONSES) -> list[Generation]:
    """Sequences of independent tokens with probabilities ``probs``, whose log-probs are those of ``said``."""
    tokens = np.random.default_rng(seed).choice(len(probs), (number, LENGTH), p=probs)
    return [Generation(row.tolist(), np.log(said[row]).tolist(), "length", Versions(0, 0)) for row in tokens]


PROBS = np.array([0.6, 0.25, 0.1, 0.05])


@pytest.mark.parametrize("seed", range(4))
def test_exact_responses_pass(seed: int) -> None:
    p_value, bins = chi_square(responses(PROBS, PROBS, seed))
    assert p_value > 1e-3
    assert 50 < bins <= SLICE**LENGTH


def test_p_values_are_uniform() -> None:
    p_values = [chi_square(responses(PROBS, PROBS, seed, number=2000))[0] for seed in range(200)]
    assert 0.4 < np.mean(p_values) < 0.6
    assert np.mean(np.array(p_values) < 0.1) < 0.2


def test_a_shift_of_some_percent_is_seen() -> None:
    shifted = PROBS + np.array([0.02, -0.02, 0.0, 0.0])
    assert chi_square(responses(shifted, PROBS, seed=0))[0] < 1e-4


def test_tokens_that_are_never_sampled_are_missed() -> None:
    without = np.array([0.6, 0.3, 0.1, 0.0])
    assert chi_square(responses(without, PROBS, seed=0))[0] < 1e-6


@pytest.mark.parametrize("probs", [[1.0, 0.0, 0.0, 0.0], [0.9999, 0.0001, 0.0, 0.0]])
def test_a_certain_response_says_nothing(probs: list[float]) -> None:
    p_value, bins = chi_square(responses(np.array(probs), np.array(probs) + 1e-300, seed=0))
    assert (math.isfinite(p_value), p_value > 0.01, bins) == (True, True, 1)
