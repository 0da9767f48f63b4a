"""Chunked log-probs and entropy against the full-vocabulary formula in float64, forward and backward.

Every weight has padding rows that are far larger than the token rows, so a padded column that enters a softmax takes
nearly all of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skyrl_spec.losses import vocab_parallel
from skyrl_spec.losses.logprobs import TokenLogprobs, vocab_parallel_logprobs

D = 16
VOCAB_SIZE = 101
# Relative and absolute; entries are of order 1.
# bf16 has 8 bits: products rounded to 2^-8 of logits of order 4, and gradients likewise.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
}


@pytest.fixture(autouse=True, params=["host", "device"])
def where_counts_are_known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and in place of a GPU: nobody knows which tokens count, and all chunks are computed."""
    if request.param == "device":
        monkeypatch.setattr(vocab_parallel, "host_knows", lambda _: False)


def make_inputs(num_tokens: int, padded_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, D, generator=generator)
    weight_VD = torch.randn(padded_size, D, generator=generator) / 4
    weight_VD[VOCAB_SIZE:] = 5.0
    targets_T = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator)
    return hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T


def reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float) -> TokenLogprobs:
    logits_TV = hidden_TD.double() @ weight_VD[:VOCAB_SIZE].double().t() / temperature
    logq_TV = logits_TV.log_softmax(-1)
    return TokenLogprobs(logq_TV.gather(1, targets_T[:, None])[:, 0], -(logq_TV.exp() * logq_TV).sum(-1).detach())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(1, 4), (7, 3), (13, 4), (8, 4), (7, 100)])
@pytest.mark.parametrize("padded_size", [101, 104, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_and_backward_equal_the_full_vocabulary_formula(
    dtype: torch.dtype, num_tokens: int, chunk_size: int, padded_size: int, temperature: float
) -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(num_tokens, padded_size, dtype)
    expected = reference(hidden_TD, weight_VD, targets_T, temperature)
    grad_T = torch.linspace(-1, 2, num_tokens, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected.logprobs_T, (hidden_TD, weight_VD), grad_T)

    result = vocab_parallel_logprobs(
        hidden_TD, weight_VD, targets_T,
        vocab_size=VOCAB_SIZE, temperature=temperature, chunk_size=chunk_size, group=None,
    )  # fmt: skip
    assert result.logprobs_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not result.entropy_T.requires_grad
    grads = torch.autograd.grad(result.logprobs_T, (hidden_TD, weight_VD), grad_T.to(result.logprobs_T.dtype))

    for got, wanted in zip([*result, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not grads[1][VOCAB_SIZE:].any()


def test_the_tolerance_would_see_a_padded_column_or_a_shift() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(13, 104, torch.float32)
    kwargs: dict[str, Any] = {"temperature": 1.0, "chunk_size": 4, "group": None}
    right = vocab_parallel_logprobs(hidden_TD, weight_VD, targets_T, vocab_size=VOCAB_SIZE, **kwargs)
    padded = vocab_parallel_logprobs(hidden_TD, weight_VD, targets_T, vocab_size=VOCAB_SIZE + 1, **kwargs)
    shifted = vocab_parallel_logprobs(hidden_TD, weight_VD, targets_T.roll(1), vocab_size=VOCAB_SIZE, **kwargs)
    for wrong in (padded, shifted):
        assert (wrong.logprobs_T - right.logprobs_T).abs().max() > 0.1


def test_gradcheck() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(5, 104, torch.float64)

    def logprobs(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return vocab_parallel_logprobs(
            hidden_TD, weight_VD, targets_T, vocab_size=VOCAB_SIZE, temperature=0.7, chunk_size=2, group=None
        ).logprobs_T

    assert torch.autograd.gradcheck(logprobs, (hidden_TD, weight_VD))


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(5, 104, torch.float32)
    kwargs: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "temperature": 1.0, "chunk_size": 2, "group": None}
    vocab_parallel_logprobs(hidden_TD, weight_VD.detach(), targets_T, **kwargs).logprobs_T.sum().backward()
    assert hidden_TD.grad is not None
    assert weight_VD.grad is None
    vocab_parallel_logprobs(hidden_TD.detach(), weight_VD, targets_T, **kwargs).logprobs_T.sum().backward()
    assert weight_VD.grad is not None
    with torch.no_grad():
        assert not vocab_parallel_logprobs(hidden_TD, weight_VD, targets_T, **kwargs).logprobs_T.requires_grad


def test_no_tokens_stay_connected() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(0, 104, torch.float32)
    result = vocab_parallel_logprobs(
        hidden_TD, weight_VD, targets_T, vocab_size=VOCAB_SIZE, temperature=1.0, chunk_size=4, group=None
    )
    assert result.logprobs_T.shape == result.entropy_T.shape == (0,)
    result.logprobs_T.sum().backward()
    assert hidden_TD.grad is not None
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()


def test_a_token_without_weight_adds_nothing_even_if_its_hidden_state_is_nan() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(7, 104, torch.float32)
    weights_T = torch.tensor([1.0, 0, 1, 1, 0, 1, 1])
    garbage_TD = hidden_TD.detach().clone()
    garbage_TD[weights_T == 0] = float("nan")
    garbage_TD.requires_grad_()
    kept = weights_T != 0
    for inputs_TD in (hidden_TD, garbage_TD):
        logprobs_T = vocab_parallel_logprobs(
            inputs_TD, weight_VD, targets_T, vocab_size=VOCAB_SIZE, temperature=1.0, chunk_size=4, group=None
        ).logprobs_T
        (weights_T[kept] * logprobs_T[kept]).sum().backward()
    assert hidden_TD.grad is not None
    assert garbage_TD.grad is not None
    assert torch.equal(garbage_TD.grad, hidden_TD.grad)
    assert not hidden_TD.grad[~kept].any()
    assert weight_VD.grad is not None
    assert weight_VD.grad.isfinite().all()
