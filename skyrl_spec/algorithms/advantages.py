"""Advantages from rewards. Shapes: P prompts, G responses per prompt (a group)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.algorithm import AlgorithmConfig

# Avoids a division by zero in a group of equal rewards.
STD_EPSILON = 1e-6

# From rewards and numbers of trained tokens, [P, G] each.
Estimator = Callable[[np.ndarray, np.ndarray], np.ndarray]


def group_advantages(rewards_PG: np.ndarray, norm_by_std: bool) -> np.ndarray:
    """Advantages of GRPO, ``A = (r - mean) / (std + 1e-6)`` within each group, float64 ``[P, G]``.

    ``norm_by_std=False`` is Dr. GRPO: ``A = r - mean``. The standard deviation is the unbiased one (divided by G - 1),
    as in SkyRL and verl. In a group of one the advantage is the reward.

    Source: DeepSeekMath (arXiv 2402.03300), equation 3; Dr. GRPO (arXiv 2503.20783).
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    if rewards_PG.shape[1] == 1:
        return rewards_PG.copy()
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if not norm_by_std:
        return centred_PG
    return centred_PG / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON)


def leave_one_out_advantages(rewards_PG: np.ndarray) -> np.ndarray:
    """Advantages of RLOO: a reward minus the mean of the other rewards of its group, float64 ``[P, G]``, G >= 2.

    Source: "Back to Basics" (arXiv:2402.14740), equation 5.
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    num_others = rewards_PG.shape[1] - 1
    assert num_others > 0, "a group of one has no others"
    return rewards_PG - (rewards_PG.sum(axis=1, keepdims=True) - rewards_PG) / num_others


def batch_advantages(rewards_PG: np.ndarray, lengths_PG: np.ndarray) -> np.ndarray:
    """Advantages of REINFORCE++: ``(r - mean) / (std + 1e-6)`` over all trained tokens of the batch, ``[P, G]``.

    Each response counts by its tokens. The KL penalty is not part of the reward here (``use_kl_loss``), so all tokens
    of a response have one advantage.

    Source: REINFORCE++ (arXiv:2501.03262), equation 10, without a discount.
    """
    rewards_PG, lengths_PG = np.asarray(rewards_PG, np.float64), np.asarray(lengths_PG, np.float64)
    weights_PG = lengths_PG / max(lengths_PG.sum(), 1.0)
    centred_PG = rewards_PG - (weights_PG * rewards_PG).sum()
    return centred_PG / (np.sqrt((weights_PG * centred_PG**2).sum()) + STD_EPSILON)


def overlong_penalty(
    response_lengths: np.ndarray, max_generate_length: int, buffer_len: int, penalty_factor: float
) -> np.ndarray:
    """DAPO's soft overlong punishment, to be added to the rewards. float64, in the shape of ``response_lengths``.

    ``penalty_factor * clip((max_generate_length - buffer_len - length) / buffer_len, -1, 0)``: 0 before the buffer,
    then linear to ``-penalty_factor`` at ``max_generate_length``. ``buffer_len=0``: no penalty. Lengths are in tokens.

    Source: DAPO (arXiv 2503.14476), equation 13.
    """
    lengths = np.asarray(response_lengths, np.float64)
    if buffer_len == 0:
        return np.zeros_like(lengths)
    return penalty_factor * np.clip((max_generate_length - buffer_len - lengths) / buffer_len, -1.0, 0.0)


# Builders by trainer.algorithm.advantage_estimator.
ESTIMATORS: dict[str, Callable[[AlgorithmConfig], Estimator]] = {
    "grpo": lambda algorithm: lambda rewards_PG, _: group_advantages(rewards_PG, algorithm.grpo_norm_by_std),
    "rloo": lambda _: lambda rewards_PG, _: leave_one_out_advantages(rewards_PG),
    "reinforce++": lambda _: batch_advantages,
}


def build_estimator(algorithm: AlgorithmConfig) -> Estimator:
    """The estimator that ``algorithm`` names.

    Raises:
        ConfigError: there is no estimator of that name.
    """
    name = algorithm.advantage_estimator
    if name not in ESTIMATORS:
        raise ConfigError(f"trainer.algorithm.advantage_estimator={name}: must be {' or '.join(ESTIMATORS)}; change it")
    return ESTIMATORS[name](algorithm)
