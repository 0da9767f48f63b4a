"""Seeds of the random streams that responses are sampled with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def prompt_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Seeds of so many prompts of one call. vLLM gives the responses of a prompt its seed, seed + 1, ..."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(count, np.uint64) >> 2]


def seed_of(*numbers: int) -> int:
    """A seed that other numbers do not share."""
    return prompt_seeds(numbers, 1)[0]
