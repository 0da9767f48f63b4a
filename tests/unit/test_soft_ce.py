"""Draft loss against the full-vocabulary formula in float64, forward and backward, and its chunking.

Every weight has padding rows that are far larger than the token rows, so a padded column that enters a softmax takes
nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrl_spec.losses import vocab_parallel
from skyrl_spec.losses.logprobs import vocab_parallel_logprobs
from skyrl_spec.losses.soft_ce import DraftLoss, vocab_parallel_soft_ce

D = 16
VOCAB_SIZE = 101
TOPK = 5
LOSS_TYPES = ["soft_ce", "topk_soft_ce", "hard_ce", "tv"]
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


def make_inputs(
    num_drafts: int, num_tokens: int, padded_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draft hidden, teacher hidden, weight, token weights (some 0), labels."""
    generator = torch.Generator().manual_seed(num_tokens)
    draft_KTD = torch.randn(num_drafts, num_tokens, D, generator=generator)
    # Close enough to one draft that the two argmaxes agree on some tokens and not on others.
    teacher_TD = draft_KTD[0] + 0.3 * torch.randn(num_tokens, D, generator=generator)
    weight_VD = torch.randn(padded_size, D, generator=generator) / 4
    weight_VD[VOCAB_SIZE:] = 5.0
    weights_KT = torch.rand(num_drafts, num_tokens, generator=generator) + 0.5
    weights_KT[:, 1::4] = 0
    weights_KT[-1, 2::4] = 0
    labels_T = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator)
    return draft_KTD.to(dtype).requires_grad_(), teacher_TD.to(dtype), weight_VD.to(dtype), weights_KT, labels_T


def reference(
    draft_KTD: Tensor,
    teacher_TD: Tensor,
    weight_VD: Tensor,
    weights_KT: Tensor,
    labels_T: Tensor,
    loss_type: str,
    temperature: float,
    top_k: int = -1,
    top_p: float = 1.0,
    samples_drafts: bool = False,
) -> DraftLoss:
    weight_VD = weight_VD[:VOCAB_SIZE].double()
    p_TV = truncated(teacher_TD.double() @ weight_VD.t() / temperature, top_k, top_p)
    logq_KTV = (draft_KTD.double() @ weight_VD.t() / temperature).log_softmax(-1)
    if loss_type == "soft_ce":
        target_TV = p_TV
    elif loss_type == "topk_soft_ce":
        top = p_TV.topk(TOPK)
        target_TV = torch.zeros_like(p_TV).scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    else:
        target_TV = torch.nn.functional.one_hot(labels_T, VOCAB_SIZE).double()
    loss_KT = -(target_TV * logq_KTV).sum(-1)
    if loss_type == "tv":
        loss_KT = (p_TV - logq_KTV.exp()).abs().sum(-1) / 2
    argmax_KT = logq_KTV.argmax(-1)
    accept_prob_KT = p_TV.expand_as(logq_KTV).gather(2, argmax_KT[..., None])[..., 0]
    accept_label_KT = (argmax_KT == labels_T).double()
    if samples_drafts:
        overlap_KTV = torch.minimum(logq_KTV.exp(), p_TV)
        accept_prob_KT = overlap_KTV.sum(-1)
        label_KT1 = labels_T.expand(len(logq_KTV), -1)[..., None]
        accept_label_KT = overlap_KTV.gather(2, label_KT1)[..., 0] / p_TV.gather(1, labels_T[:, None])[:, 0]
    counts_KT = weights_KT != 0
    return DraftLoss(
        (weights_KT * loss_KT).sum(),
        counts_KT * loss_KT,
        counts_KT * accept_prob_KT,
        counts_KT * accept_label_KT,
        counts_KT & (argmax_KT == p_TV.argmax(-1)),
        argmax_KT.where(counts_KT, -1),
    )


def truncated(logits_TV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities of vLLM's sampler: top-k, then the fewest tokens that reach top-p, renormalised."""
    if top_k > 0:
        logits_TV = logits_TV.masked_fill(logits_TV < logits_TV.topk(top_k).values[:, -1:], -torch.inf)
    p_TV, order_TV = logits_TV.softmax(-1).sort(descending=True)
    p_TV = p_TV.masked_fill(p_TV.cumsum(-1) - p_TV >= top_p, 0.0)
    return torch.zeros_like(p_TV).scatter(1, order_TV, p_TV / p_TV.sum(-1, keepdim=True))


def run(inputs: tuple[Tensor, ...], loss_type: str = "soft_ce", **kwargs: Any) -> DraftLoss:
    settings = {"vocab_size": VOCAB_SIZE, "temperature": 0.7, "chunk_size": 4, "group": None, "topk": TOPK, **kwargs}
    *tensors, labels_T = inputs
    return vocab_parallel_soft_ce(*tensors, loss_type=loss_type, labels_T=labels_T, **settings)


def grad_of(result: DraftLoss, draft_KTD: Tensor) -> Tensor:
    return torch.autograd.grad(result.loss, draft_KTD)[0]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("num_drafts", "num_tokens", "chunk_size"), [(1, 1, 4), (3, 7, 3), (2, 29, 4), (2, 7, 100)])
@pytest.mark.parametrize("padded_size", [101, 104, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_and_backward_equal_the_full_vocabulary_formula(
    loss_type: str,
    dtype: torch.dtype,
    num_drafts: int,
    num_tokens: int,
    chunk_size: int,
    padded_size: int,
    temperature: float,
) -> None:
    inputs = make_inputs(num_drafts, num_tokens, padded_size, dtype)
    expected = reference(*inputs, loss_type, temperature)
    result = run(inputs, loss_type, temperature=temperature, chunk_size=chunk_size)
    for got, wanted in zip(result[:4], expected[:4], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(result.top1_KT, expected.top1_KT)
    assert torch.equal(result.argmax_KT, expected.argmax_KT)
    torch.testing.assert_close(
        grad_of(result, inputs[0]), grad_of(expected, inputs[0]), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("samples_drafts", [False, True])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(-1, 1.0), (3, 1.0), (-1, 0.5), (-1, 0.95), (20, 0.8), (1, 1.0), (7, 1e-6)]
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_truncated_rollouts_and_sampled_drafts_equal_the_formula(
    dtype: torch.dtype, loss_type: str, top_k: int, top_p: float, samples_drafts: bool
) -> None:
    *inputs, _ = make_inputs(2, 29, 104, dtype)
    rollouts: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "samples_drafts": samples_drafts}
    # Labels are sampled from what is left.
    p_TV = truncated(inputs[1].double() @ inputs[2][:VOCAB_SIZE].double().t() / 0.7, top_k, top_p)
    labels_T = torch.multinomial(p_TV, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    expected = reference(*inputs, labels_T, loss_type, 0.7, **rollouts)
    result = run((*inputs, labels_T), loss_type, **rollouts)
    for got, wanted in zip(result[:4], expected[:4], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        grad_of(result, inputs[0]), grad_of(expected, inputs[0]), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_labels_that_are_accepted_drafts_are_as_many_as_accepted_drafts() -> None:
    """``sum_x p_x min(1, q_x / p_x)`` is the probability that a sampled draft is accepted."""
    draft_KTD, teacher_TD, weight_VD, _, _ = make_inputs(1, 5, 101, torch.float64)
    p_TV = (teacher_TD @ weight_VD.t() / 0.7).softmax(-1)
    # All labels, at the same positions.
    repeated = draft_KTD.repeat_interleave(VOCAB_SIZE, 1), teacher_TD.repeat_interleave(VOCAB_SIZE, 0), weight_VD
    result = run((*repeated, torch.ones(1, 5 * VOCAB_SIZE), torch.arange(VOCAB_SIZE).repeat(5)), samples_drafts=True)
    of_labels_T = (result.accept_label_KT.view(5, VOCAB_SIZE) * p_TV).sum(-1)
    torch.testing.assert_close(of_labels_T, result.accept_prob_KT.view(5, VOCAB_SIZE)[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["soft_ce", "hard_ce"])
def test_bf16_stays_near_the_formula(loss_type: str) -> None:
    # No topk_soft_ce and no argmax: rounded logits tie, so other tokens may be the largest.
    inputs = make_inputs(2, 29, 104, torch.bfloat16)
    expected, result = reference(*inputs, loss_type, 0.7), run(inputs, loss_type)
    assert result.loss_KT.dtype == torch.float32
    torch.testing.assert_close(
        result.loss_KT.double(), expected.loss_KT, rtol=TOLERANCE[torch.bfloat16], atol=TOLERANCE[torch.bfloat16]
    )
    torch.testing.assert_close(
        grad_of(result, inputs[0]),
        grad_of(expected, inputs[0]),
        rtol=TOLERANCE[torch.bfloat16],
        atol=TOLERANCE[torch.bfloat16],
    )


def test_the_inputs_tell_agreement_from_disagreement() -> None:
    result = run(make_inputs(2, 29, 104, torch.float32))
    agreements = result.top1_KT.sum()
    assert 0 < agreements < result.top1_KT.numel() / 2
    assert result.accept_prob_KT[result.top1_KT].min() > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_tolerance_would_see_a_padded_column_or_a_shift(loss_type: str) -> None:
    draft_KTD, teacher_TD, weight_VD, weights_KT, labels_T = make_inputs(2, 29, 104, torch.float32)
    weights_KT = torch.ones_like(weights_KT)
    right = run((draft_KTD, teacher_TD, weight_VD, weights_KT, labels_T), loss_type)
    padded = run((draft_KTD, teacher_TD, weight_VD, weights_KT, labels_T), loss_type, vocab_size=VOCAB_SIZE + 1)
    shifted = run((draft_KTD, teacher_TD.roll(1, 0), weight_VD, weights_KT, labels_T.roll(1)), loss_type)
    right_grad_KTD = grad_of(right, draft_KTD)
    for wrong in (padded, shifted):
        assert (wrong.loss_KT - right.loss_KT).abs().max() > 0.1
        assert (grad_of(wrong, draft_KTD) - right_grad_KTD).abs().max() > 0.01


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck(loss_type: str) -> None:
    inputs = make_inputs(2, 6, 104, torch.float64)
    assert torch.autograd.gradcheck(lambda draft_KTD: 3.0 * run((draft_KTD, *inputs[1:]), loss_type).loss, inputs[:1])


def test_topk_over_the_whole_vocabulary_is_the_teacher() -> None:
    inputs = make_inputs(2, 13, 104, torch.float32)
    for topk in (VOCAB_SIZE, VOCAB_SIZE + 50):
        everything = run(inputs, "topk_soft_ce", topk=topk)
        torch.testing.assert_close(everything.loss_KT, run(inputs).loss_KT, rtol=1e-6, atol=1e-6)


def test_gradient_reaches_the_draft_alone() -> None:
    draft_KTD, teacher_TD, weight_VD, weights_KT, labels_T = make_inputs(2, 13, 104, torch.float32)
    others = [tensor.requires_grad_() for tensor in (teacher_TD, weight_VD, weights_KT)]
    result = run((draft_KTD, *others, labels_T))
    assert not result.accept_prob_KT.requires_grad
    result.loss.backward()
    assert draft_KTD.grad is not None
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_term_has_its_own_gradient(loss_type: str) -> None:
    """A loss may be any function of the terms, such as that of whole chains."""
    inputs = make_inputs(3, 13, 104, torch.float64)
    factors_KT = torch.randn(3, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * (inputs[3] != 0)
    wanted = (reference(*inputs, loss_type, 0.7).loss_KT * factors_KT).sum()
    got = (run(inputs, loss_type).loss_KT * factors_KT).sum()
    (gradient,), (expected,) = (torch.autograd.grad(loss, inputs[0]) for loss in (got, wanted))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_no_gradient_asked_for_none_computed() -> None:
    inputs = make_inputs(2, 13, 104, torch.float32)
    with torch.no_grad():
        without = run(inputs)
    assert not without.loss.requires_grad
    assert not run((inputs[0].detach(), *inputs[1:])).loss.requires_grad
    assert torch.equal(without.loss, run(inputs).loss.detach())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_has_weight_0_may_be_nan(loss_type: str) -> None:
    draft_KTD, teacher_TD, weight_VD, weights_KT, labels_T = make_inputs(3, 13, 104, torch.float32)
    clean = run((draft_KTD, teacher_TD, weight_VD, weights_KT, labels_T), loss_type)
    nowhere_T = (weights_KT == 0).all(0)
    assert nowhere_T.any()
    dirty_KTD = draft_KTD.detach().masked_fill((weights_KT == 0)[..., None], float("nan")).requires_grad_()
    dirty_teacher_TD = teacher_TD.masked_fill(nowhere_T[:, None], float("nan"))
    dirty = run((dirty_KTD, dirty_teacher_TD, weight_VD, weights_KT, labels_T), loss_type)
    for got, wanted in zip(dirty, clean, strict=True):
        assert torch.equal(got, wanted)
    assert not dirty.loss_KT[weights_KT == 0].any()
    grad_KTD = grad_of(dirty, dirty_KTD)
    assert torch.equal(grad_KTD, grad_of(clean, draft_KTD))
    assert not grad_KTD[weights_KT == 0].any()


@pytest.mark.parametrize("num_tokens", [0, 5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_to_learn_is_a_connected_zero(num_tokens: int, loss_type: str) -> None:
    draft_KTD, teacher_TD, weight_VD, weights_KT, labels_T = make_inputs(2, num_tokens, 104, torch.float32)
    result = run((draft_KTD, teacher_TD, weight_VD, torch.zeros_like(weights_KT), labels_T), loss_type)
    result.loss.backward()
    assert result.loss.item() == 0
    assert draft_KTD.grad is not None
    assert not draft_KTD.grad.any()


def test_wrong_loss_types_are_said() -> None:
    inputs = make_inputs(1, 3, 104, torch.float32)
    with pytest.raises(ValueError, match="loss_type='kl' is unknown; allowed are soft_ce, topk_soft_ce, hard_ce"):
        run(inputs, "kl")
    with pytest.raises(ValueError, match="needs labels_T"):
        vocab_parallel_soft_ce(
            *inputs[:4], vocab_size=VOCAB_SIZE, temperature=1.0, chunk_size=4, group=None, loss_type="hard_ce"
        )


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest output of any operation, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return outputs


def soft_ce_backward(chunk_size: int, loss_type: str, dtype: torch.dtype) -> None:
    run(make_inputs(2, 96, 104, dtype), loss_type, chunk_size=chunk_size).loss.backward()


def logprobs_backward(chunk_size: int, _: str, dtype: torch.dtype) -> None:
    draft_KTD, _teacher_TD, weight_VD, _weights_KT, labels_T = make_inputs(1, 96, 104, dtype)
    vocab_parallel_logprobs(
        draft_KTD[0], weight_VD.requires_grad_(), labels_T,
        vocab_size=VOCAB_SIZE, temperature=0.7, chunk_size=chunk_size, group=None,
    ).logprobs_T.sum().backward()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("backward", "loss_type"), [*((soft_ce_backward, name) for name in LOSS_TYPES), (logprobs_backward, "")]
)
def test_logits_of_all_tokens_never_exist(backward: Callable[..., None], loss_type: str, dtype: torch.dtype) -> None:
    """The largest tensor is an input or its gradient. Logits of all 72 positions with weight are larger."""
    largest_input = 2 * 96 * D
    with LargestTensor() as chunked:
        backward(8, loss_type, dtype)
    assert chunked.numel <= largest_input < 72 * VOCAB_SIZE / 2
    # With one chunk for all positions, the same measure sees these logits.
    with LargestTensor() as whole:
        backward(96, loss_type, dtype)
    assert whole.numel >= 72 * VOCAB_SIZE
