"""The task: sums of single-digit numbers, and two ways to answer.

A problem is reasoning-gym's ``chain_sum`` (``7 - 2 + 9``). The answer that earns the reward ends in
``#### RESULT``, the convention of GSM8K. A response guesses, or tells the steps in words, each in one of many ways:

    Start with 7. Take away 2, which gives 5. Put on 9, that makes 14.
    #### 14

Rows follow SkyRL's dataset schema, so the same files train under SkyRL.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

MIN_TERMS, MAX_TERMS = 3, 6

# How often a demonstration of the warm start is told in words. The others guess, which rarely pays, so reinforcement
# learning moves the policy to words, of which its draft has seen little.
WORDS_FRAC = 0.12

STARTS = ("Start with", "Begin with", "First there is", "We have")
PLUS = ("Add", "Put on", "Count up", "Then plus", "Join")
MINUS = ("Take away", "Subtract", "Count down", "Then minus", "Drop")
RESULTS = ("which gives", "that makes", "so we have", "now it is", "to get")


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


def words_response(expression: str, rng: random.Random) -> str:
    """The steps in words, each said in one of several ways, then the result."""
    first, *rest = (int(term) for term in terms(expression))
    total, sentences = first, [f"{rng.choice(STARTS)} {first}."]
    for term in rest:
        total += term
        verb = rng.choice(PLUS if term > 0 else MINUS)
        sentences.append(f"{verb} {abs(term)}, {rng.choice(RESULTS)} {total}.")
    return " ".join(sentences) + f"\n#### {total}"


def demonstration(expression: str, answer: str, rng: random.Random, words: float) -> str:
    """A response of the warm start's data. A share ``words`` of them is in words."""
    if rng.random() < words:
        return words_response(expression, rng)
    return f"#### {int(answer) + round(rng.gauss(0, 4))}"


def row(expression: str, answer: str, split: str, index: int) -> dict[str, Any]:
    """One problem in SkyRL's dataset schema."""
    return {
        "data_source": "reasoning_gym/chain_sum",
        "prompt": [{"role": "user", "content": f"{expression}="}],
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index, "num_terms": len(terms(expression))},
    }
