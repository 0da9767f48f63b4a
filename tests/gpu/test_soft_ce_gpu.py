"""The draft loss in bf16 on a CUDA device: against float64, and its memory at the largest vocabulary in use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skyrl_spec.losses.logprobs import vocab_parallel_logprobs
from skyrl_spec.losses.soft_ce import DraftLoss, vocab_parallel_soft_ce

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]
VOCAB_SIZE, PADDED_SIZE = 151_936, 152_064
K, T, D, CHUNK_SIZE = 3, 1000, 256, 128


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    draft_KTD = randn(K, T, D)
    teacher_TD = draft_KTD[0] + 0.1 * randn(T, D)
    weight_VD = randn(PADDED_SIZE, D) * 2 * D**-0.5
    weight_VD[VOCAB_SIZE:] = 5.0
    weights_KT = torch.rand(K, T, generator=generator, device="cuda") / T
    return draft_KTD.bfloat16(), teacher_TD.bfloat16(), weight_VD.bfloat16(), weights_KT


def soft_ce(inputs: tuple[Tensor, ...], chunk_size: int = CHUNK_SIZE) -> tuple[DraftLoss, Tensor]:
    draft_KTD = inputs[0].detach().requires_grad_()
    result = vocab_parallel_soft_ce(
        draft_KTD, *inputs[1:], vocab_size=VOCAB_SIZE, temperature=0.8, chunk_size=chunk_size, group=None
    )
    return result, torch.autograd.grad(result.loss, draft_KTD)[0]


def test_bf16_against_float64() -> None:
    # 50 tokens: the float64 side holds the same chunks, in eight bytes.
    draft_KTD, teacher_TD, weight_VD, weights_KT = make_inputs()
    inputs = draft_KTD[:, :50], teacher_TD[:50], weight_VD, weights_KT[:, :50]
    result, grad_KTD = soft_ce(inputs)
    expected, expected_grad_KTD = soft_ce(tuple(tensor.double() for tensor in inputs))
    # Logits of order 8 are rounded to 2^-8 of themselves; a CE averages over them.
    torch.testing.assert_close(result.loss_KT.double(), expected.loss_KT, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=2e-3, atol=0)
    error = (grad_KTD.double() - expected_grad_KTD).norm() / expected_grad_KTD.norm()
    assert error < 2e-2


def test_logprobs_bf16_against_float64() -> None:
    draft_KTD, _, weight_VD, _ = make_inputs()
    targets_T = torch.randint(VOCAB_SIZE, (T,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def run(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        result = vocab_parallel_logprobs(
            hidden_TD, weight_VD, targets_T, vocab_size=VOCAB_SIZE, temperature=0.8, chunk_size=CHUNK_SIZE, group=None
        )
        return result.logprobs_T, result.entropy_T

    for got, wanted in zip(run(draft_KTD[0], weight_VD), run(draft_KTD[0].double(), weight_VD.double()), strict=True):
        # A target's logit of order 8, rounded to 2^-8 of itself.
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=6e-2)


def test_memory_at_152k_is_that_of_a_chunk() -> None:
    draft_KTD, teacher_TD, weight_VD, weights_KT = make_inputs()
    # Once small, for the workspaces that the libraries keep.
    soft_ce((draft_KTD[:, :CHUNK_SIZE], teacher_TD[:CHUNK_SIZE], weight_VD, weights_KT[:, :CHUNK_SIZE]))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    soft_ce((draft_KTD, teacher_TD, weight_VD, weights_KT))
    extra = torch.cuda.max_memory_allocated() - before
    # Bytes an element: two float32 buffers, a bf16 one, a product of an eighth of a chunk; the rest is [T, D] and less.
    assert extra < 12 * CHUNK_SIZE * PADDED_SIZE
    # Less than one tensor of bf16 logits for all tokens, of which a plain version holds several in float32.
    assert extra < 2 * T * PADDED_SIZE
