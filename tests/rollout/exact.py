"""Exact distributions of tiny models, by transformers, and tests of an engine's samples against them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from engine_process import EngineProcess
from tiny_models import EOS_TOKEN, PROMPT, VOCAB_SIZE, split_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Generation


def reference_model(path: Path) -> Any:
    """The policy in ``path``, by transformers."""
    is_mimo = json.loads((path / "config.json").read_text())["architectures"] == ["MiMoForCausalLM"]
    if not is_mimo:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # transformers has no MiMo architecture. Its trunk is that of Qwen2.
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(path)).eval()
    model.load_state_dict(split_weights(path)[0], strict=not model.config.tie_word_embeddings)
    return model


@torch.no_grad()
def exact_logprobs(path: Path, token_ids: list[list[int]], sampling: SamplingConfig) -> Tensor:
    """``[B, S, V]``: exact log-probs of the next token after sampling settings, in float64 by transformers."""
    logits = reference_model(path)(torch.tensor(token_ids)).logits.double() / (sampling.temperature or 1.0)
    if sampling.top_k > 0:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
    # A token stays if those ahead of it do not reach top_p yet.
    outside = ordered.cumsum(-1) - ordered >= sampling.top_p
    outside[..., 0] = False
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf).log_softmax(-1)


def generate(
    engine: EngineProcess, prompts: list[list[int]], sampling: SamplingConfig, n: int = 1, seed: int | None = None
) -> list[list[Generation]]:
    return engine.generate(prompts, sampling, n, seed)


def second_token_p_value(engine: EngineProcess, path: Path, sampling: SamplingConfig, seed: int | None = None) -> float:
    """``token_p_values`` of the second token, the first one that can be drafted."""
    return token_p_values(engine, path, sampling, (1,), seed)[0]


def token_p_values(
    engine: EngineProcess, path: Path, sampling: SamplingConfig, indices: Sequence[int], seed: int | None = None
) -> list[float]:
    """Chi-square p-values of 8,192 samples against the exact marginals of the tokens at ``indices`` (from 0).

    Bins with an expected count below 5 are pooled. A sampled token of probability 0 makes the p-value 0.
    """
    samples = generate(engine, [PROMPT], replace(sampling, max_generate_length=3), n=8192, seed=seed)[0]
    p_values = []
    for index in indices:
        # Shorter responses have no token at this index.
        tokens = torch.tensor([sample.token_ids[index] for sample in samples if len(sample.token_ids) > index])
        counts = torch.bincount(tokens, minlength=VOCAB_SIZE).double()
        p_values.append(_chi_square_p_value(counts, _marginal(path, sampling, index)))
    return p_values


def sequence_p_value(
    engine: EngineProcess, path: Path, sampling: SamplingConfig, num_tokens: int, num_samples: int = 8192
) -> float:
    """Chi-square p-value of responses of at most ``num_tokens`` tokens against their exact joint distribution.

    Responses with an expected count below 5 form one bin.
    """
    sampling = replace(sampling, max_generate_length=num_tokens)
    samples = generate(engine, [PROMPT], sampling, n=num_samples)[0]
    probabilities = _joint(path, sampling, num_tokens, smallest=5 / num_samples)
    bins = {sequence: index for index, sequence in enumerate(probabilities)}
    observed = torch.zeros(len(bins) + 1, dtype=torch.float64)
    for sample in samples:
        observed[bins.get(tuple(sample.token_ids), len(bins))] += 1
    expected = torch.tensor([*probabilities.values(), 1 - sum(probabilities.values())], dtype=torch.float64)
    assert len(bins) > 50, "a few sequences tell little"
    return _chi_square_p_value(observed, expected)


def _joint(path: Path, sampling: SamplingConfig, num_tokens: int, smallest: float) -> dict[tuple[int, ...], float]:
    """Exact probabilities of responses, without those below ``smallest``."""
    open_ones, done = {(): 1.0}, {}
    for length in range(1, num_tokens + 1):
        logprobs = exact_logprobs(path, [[*PROMPT, *prefix] for prefix in open_ones], sampling)[:, -1]
        joint = torch.tensor(list(open_ones.values()), dtype=torch.float64)[:, None] * logprobs.exp()
        rows, tokens = (joint >= smallest).nonzero(as_tuple=True)
        prefixes = list(open_ones)
        longer = {(*prefixes[r], t): float(joint[r, t]) for r, t in zip(rows.tolist(), tokens.tolist(), strict=True)}
        ended = {s: p for s, p in longer.items() if s[-1] == EOS_TOKEN or length == num_tokens}
        done |= ended
        open_ones = {sequence: p for sequence, p in longer.items() if sequence not in ended}
    return done


def _marginal(path: Path, sampling: SamplingConfig, index: int) -> Tensor:
    """``[V]``: exact probabilities of the token at ``index``, among responses to ``PROMPT`` of sufficient length."""
    prefixes, weights = [PROMPT], torch.ones(1, dtype=torch.float64)
    for _ in range(index):
        joint = weights[:, None] * exact_logprobs(path, prefixes, sampling)[:, -1].exp()
        joint[:, EOS_TOKEN] = 0.0
        rows, tokens = joint.nonzero(as_tuple=True)
        prefixes = [[*prefixes[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        weights = joint[rows, tokens]
    marginal = weights @ exact_logprobs(path, prefixes, sampling)[:, -1].exp()
    return marginal / weights.sum()


def _chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    if counts[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    observed_bins, expected_bins = counts[~rare], expected[~rare]
    if expected[rare].sum() > 0:
        observed_bins = torch.cat([observed_bins, counts[rare].sum()[None]])
        expected_bins = torch.cat([expected_bins, expected[rare].sum()[None]])
    return float(scipy.stats.chisquare(observed_bins.numpy(), expected_bins.numpy()).pvalue)


def assert_exact_logprobs(samples: list[Generation], prompt: list[int], path: Path, sampling: SamplingConfig) -> None:
    """Asserts that log-probs equal those of an exact forward pass to 1e-4."""
    for sample in samples:
        exact = exact_logprobs(path, [prompt + sample.token_ids], sampling)[0, len(prompt) - 1 : -1]
        exact = exact.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        assert (exact - torch.tensor(sample.logprobs)).abs().max() < 1e-4
