"""float32 logits from bf16 states and weights, against float64, where |logit| reaches 32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl_spec.errors import ConfigError
from skyrl_spec.losses.logprobs import vocab_parallel_argmax, vocab_parallel_logprobs
from skyrl_spec.losses.soft_ce import vocab_parallel_soft_ce
from skyrl_spec.losses.vocab_parallel import ChunkLogits, VocabShard, require_float32_product

NUM_TOKENS, D, VOCAB_SIZE = 64, 64, 500
# Nats. bf16 has 8 bits: a logit of 32 is rounded by up to 0.06.
FP32_ERROR, ROUNDED_ERROR = 1e-4, 1e-2


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(VOCAB_SIZE, D, generator=generator)
    hidden_TD = torch.randn(NUM_TOKENS, D, generator=generator)
    logits_TV = hidden_TD @ weight_VD.t()
    hidden_TD *= (32 / logits_TV.abs().amax(dim=1))[:, None]
    targets_T = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    return hidden_TD.bfloat16(), weight_VD.bfloat16(), targets_T


def logprob_error(fp32_logits: bool) -> float:
    hidden_TD, weight_VD, targets_T = make_inputs()
    logits_TV = hidden_TD.double() @ weight_VD.double().t()
    assert logits_TV.abs().max() > 28
    expected_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    logprobs_T = vocab_parallel_logprobs(
        hidden_TD, weight_VD, targets_T,
        vocab_size=VOCAB_SIZE, temperature=1.0, chunk_size=10, group=None, fp32_logits=fp32_logits,
    ).logprobs_T  # fmt: skip
    return float((logprobs_T.double() - expected_T).abs().max())


def draft_loss_error(fp32_logits: bool) -> float:
    """Largest error of the cross-entropy of one token."""
    teacher_TD, weight_VD, _ = make_inputs()
    draft_TD = teacher_TD.flip(0)
    teacher_TV, draft_TV = (x.double() @ weight_VD.double().t() for x in (teacher_TD, draft_TD))
    expected_T = -(teacher_TV.softmax(-1) * draft_TV.log_softmax(-1)).sum(-1)
    result = vocab_parallel_soft_ce(
        draft_TD[None], teacher_TD, weight_VD, torch.ones(1, NUM_TOKENS),
        vocab_size=VOCAB_SIZE, temperature=1.0, chunk_size=10, group=None, fp32_logits=fp32_logits,
    )  # fmt: skip
    return float((result.loss_KT[0].double() - expected_T).abs().max())


@pytest.mark.parametrize("error", [logprob_error, draft_loss_error])
def test_logits_are_not_rounded(error) -> None:  # type: ignore[no-untyped-def]
    assert error(fp32_logits=True) < FP32_ERROR
    assert error(fp32_logits=False) > ROUNDED_ERROR


def test_gradients_are_those_of_the_unrounded_softmax() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs()
    hidden_TD.requires_grad_()
    logits_TV = hidden_TD.double() @ weight_VD.double().t()
    (expected_TD,) = torch.autograd.grad(
        logits_TV.log_softmax(-1).gather(1, targets_T[:, None]).sum(), hidden_TD, retain_graph=True
    )

    def error(fp32_logits: bool) -> float:
        logprobs_T = vocab_parallel_logprobs(
            hidden_TD, weight_VD, targets_T,
            vocab_size=VOCAB_SIZE, temperature=1.0, chunk_size=10, group=None, fp32_logits=fp32_logits,
        ).logprobs_T  # fmt: skip
        (grad_TD,) = torch.autograd.grad(logprobs_T.sum(), hidden_TD)
        return float((grad_TD.double() - expected_TD.double()).norm() / expected_TD.double().norm())

    # The gradient is bf16, and so are the operands of its product.
    assert error(fp32_logits=True) < 3e-3
    assert error(fp32_logits=True) < error(fp32_logits=False)


def test_argmax_separates_two_near_tokens() -> None:
    """bf16 rounds the two largest logits to the same number, and the lower id would win."""
    weight_VD = torch.zeros(3, 2, dtype=torch.bfloat16)
    weight_VD[1], weight_VD[2] = torch.tensor([32.0, 0.0]), torch.tensor([32.0, 0.03125])
    hidden_TD = torch.ones(1, 2, dtype=torch.bfloat16)
    head = {"vocab_size": 3, "chunk_size": 4, "group": None}
    assert vocab_parallel_argmax(hidden_TD, weight_VD, **head, fp32_logits=True).tolist() == [2]
    assert vocab_parallel_argmax(hidden_TD, weight_VD, **head).tolist() == [1]


class MatrixProducts(TorchDispatchMode):
    """Overloads and output dtypes of the matrix products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.calls.append((func._overloadname, result.dtype))
        return result


def test_cuda_multiplies_bf16_operands_into_float32() -> None:
    """Fake tensors take the CUDA branch through torch's own checks of dtypes and shapes; no kernel runs."""
    with FakeTensorMode(), MatrixProducts() as products:
        weight_VD = torch.empty(VOCAB_SIZE, D, dtype=torch.bfloat16, device="cuda")
        shard = VocabShard(weight_VD, start=0, rank=0, is_padding=False, group=None, fp32_logits=True)
        logits = ChunkLogits(shard, chunk_size=7, temperature=1.0)
        # A build of torch without CUDA cannot slice these tensors, as ``write`` does.
        logits._write_product(torch.empty(7, D, dtype=torch.bfloat16, device="cuda"), logits.buffer())
    assert products.calls == [("dtype_out", torch.float32)]
    assert logits.float32_weight_vD is None


def test_a_torch_without_the_product_is_refused() -> None:
    require_float32_product()
    # An operator without out_dtype, as torch.mm was before 2.8.
    with pytest.raises(ConfigError, match=r"fp32_output_head=true: torch .* has no mv with out_dtype"):
        require_float32_product(torch.ops.aten.mv)
