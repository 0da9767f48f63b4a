"""Do responses occur as often as their log-probs say? A chi-square test of whole sequences on a few tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Generation

NUM_RESPONSES = 16384
# The slice of the vocabulary, by top-k, and the tokens of a response: at most 256 sequences.
SLICE, LENGTH = 4, 4
# Rarer sequences form one bin. One that is expected so often does occur, so that the bins do not depend on chance.
_LEAST_EXPECTED = 20


def sliced_sampling(temperature: float) -> SamplingConfig:
    """Sampling of short responses from the slice."""
    return SamplingConfig(max_generate_length=LENGTH, temperature=temperature, top_k=SLICE)


def chi_square(responses: Sequence[Generation]) -> tuple[float, int]:
    """p-value of how often each sequence occurs, by the probabilities that engines report, and the number of bins.

    Args:
        responses: to one prompt, with log-probs of the distribution that they were sampled from.
    """
    from scipy.stats import chisquare

    counts = Counter(tuple(response.token_ids) for response in responses)
    probability = {tuple(response.token_ids): float(np.exp(np.sum(response.logprobs))) for response in responses}
    common = [sequence for sequence in counts if probability[sequence] * len(responses) >= _LEAST_EXPECTED]
    observed = [counts[sequence] for sequence in common]
    expected = [probability[sequence] * len(responses) for sequence in common]
    rest = len(responses) - sum(expected)
    if rest >= _LEAST_EXPECTED:
        observed.append(len(responses) - sum(observed))
        expected.append(rest)
    elif sum(observed) < len(responses):
        # The rest is too rare for a bin of its own.
        observed[0] += len(responses) - sum(observed)
        expected[0] += rest
    if len(observed) < 2:
        return 1.0, len(observed)
    scale = len(responses) / sum(expected)
    return float(chisquare(observed, np.array(expected) * scale).pvalue), len(observed)
