"""The task: sums of single-digit numbers, with every step written out.

A problem is reasoning-gym's ``chain_sum`` (``7 - 2 + 9``). The answer that earns the reward ends in
``#### RESULT``, the convention of GSM8K. A worked response carries a running total:

    7-2=5
    5+9=14
    #### 14

Rows follow SkyRL's dataset schema, so the same files train under SkyRL.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

MIN_TERMS, MAX_TERMS = 3, 6

# How often a demonstration of the warm start guesses the result instead of working it out, by number of
# terms: the warm-started policy works out short sums and guesses long ones. Guessing rarely pays, so
# there is something for reinforcement learning to find.
GUESS_FRAC = {3: 0.08, 4: 0.30, 5: 0.70, 6: 0.85}


def problems(seed: int) -> Iterator[tuple[str, str]]:
    """Endless distinct ``(expression, answer)`` pairs of reasoning-gym's chain_sum, e.g. ``("7-2+9", "14")``."""
    config = ChainSumConfig(min_terms=MIN_TERMS, max_terms=MAX_TERMS, min_digits=1, max_digits=1, seed=seed, size=10**9)
    dataset, seen = ChainSumDataset(config), set()
    for index in range(config.size):
        entry = dataset[index]
        expression = entry["metadata"]["expression"].replace(" ", "")
        if expression not in seen:
            seen.add(expression)
            yield expression, entry["answer"]


def terms(expression: str) -> list[str]:
    """``"7-2+9"`` -> ``["7", "-2", "+9"]``."""
    return expression.replace("+", " +").replace("-", " -").split()


def worked_response(expression: str) -> str:
    """The running total, a line a step, then the result."""
    first, *rest = terms(expression)
    total, lines = int(first), []
    for term in rest:
        result = total + int(term)
        lines.append(f"{total}{term}={result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])


def demonstration(expression: str, answer: str, rng: random.Random) -> str:
    """A response of the warm start's data: worked out, or guessed as often as ``GUESS_FRAC`` says."""
    if rng.random() < GUESS_FRAC[len(terms(expression))]:
        return f"#### {int(answer) + round(rng.gauss(0, 4))}"
    return worked_response(expression)


def row(expression: str, answer: str, split: str, index: int) -> dict[str, Any]:
    """One problem in SkyRL's dataset schema."""
    return {
        "data_source": "reasoning_gym/chain_sum",
        "prompt": [{"role": "user", "content": f"{expression}="}],
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index, "num_terms": len(terms(expression))},
    }
