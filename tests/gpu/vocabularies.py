"""Checks of losses and log-probs in bf16 at vocabularies of 152k and 248k, against plain ones in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Check, Figure, relative_error
from torch import Tensor

from skyrl_spec.losses.logprobs import vocab_parallel_logprobs
from skyrl_spec.losses.soft_ce import DraftLoss, vocab_parallel_soft_ce

TEMPERATURE = 0.8
# Tokens and padded rows of Qwen3 and Qwen3.5.
VOCABULARIES = {"152k": (151_936, 152_064), "248k": (248_077, 248_320)}
# Drafts, target positions, hidden size, positions of a chunk.
NUM_DRAFTS, NUM_TOKENS, HIDDEN_SIZE, CHUNK_SIZE = 3, 200, 1024, 64
# Logits of order 8 are rounded to 2^-8 of themselves, a log-prob likewise.
GRADIENT_LIMIT, LOSS_LIMIT, LOGPROB_LIMIT = 2e-2, 2e-3, 6e-2
# float32 sums of 1,024 products of numbers of order 1.
FP32_LIMIT = 2e-4
# Truncation of the rollouts, and the error of a probability from float32 logits.
TOP_K, TOP_P, ACCEPT_LIMIT = 100, 0.9, 1e-4


def sizes(device: torch.device, vocabulary: str) -> tuple[int, int]:
    """Tokens and rows; a hundredth of them on a CPU."""
    divisor = 1 if device.type == "cuda" else 100
    num_tokens, num_rows = VOCABULARIES[vocabulary]
    return num_tokens // divisor, num_rows // divisor


def make_inputs(device: torch.device, vocab_size: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of drafts and teacher, output weight and weights of tokens. Padded rows would win every softmax."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    draft_KTD = randn(NUM_DRAFTS, NUM_TOKENS, HIDDEN_SIZE)
    teacher_TD = draft_KTD[0] + 0.1 * randn(NUM_TOKENS, HIDDEN_SIZE)
    weight_VD = randn(num_rows, HIDDEN_SIZE) * 2 * HIDDEN_SIZE**-0.5
    weight_VD[vocab_size:] = 5.0
    weights_KT = torch.rand(NUM_DRAFTS, NUM_TOKENS, generator=generator, device=device) / NUM_TOKENS
    return draft_KTD.bfloat16(), teacher_TD.bfloat16(), weight_VD.bfloat16(), weights_KT


def _loss_of(inputs: tuple[Tensor, Tensor, Tensor, Tensor], vocab_size: int, **options: Any) -> DraftLoss:
    shape: dict[str, Any] = {"temperature": TEMPERATURE, "chunk_size": CHUNK_SIZE, "group": None}
    return vocab_parallel_soft_ce(*inputs, vocab_size=vocab_size, **shape, **options)


def soft_ce(device: torch.device, _folder: Path, vocabulary: str) -> Figure:
    """The draft's loss and its gradient."""
    vocab_size, num_rows = sizes(device, vocabulary)
    draft_KTD, teacher_TD, weight_VD, weights_KT = make_inputs(device, vocab_size, num_rows)
    draft_KTD.requires_grad_()
    result = _loss_of((draft_KTD, teacher_TD, weight_VD, weights_KT), vocab_size)
    (gradient_KTD,) = torch.autograd.grad(result.loss, draft_KTD)
    loss, wanted_KTD = _plain(draft_KTD, teacher_TD, weight_VD[:vocab_size], weights_KT)
    loss_error = abs(float(result.loss) / loss - 1)
    assert loss_error < LOSS_LIMIT, f"the loss differs by {loss_error:.1e}"
    return Figure(relative_error(gradient_KTD, wanted_KTD), GRADIENT_LIMIT, "relative", details={"loss": loss_error})


def _plain(draft_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor, weights_KT: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient in float64, 10 tokens at a time."""
    weight_VD, total, gradients = weight_VD.double(), 0.0, []
    for rows in torch.arange(NUM_TOKENS, device=draft_KTD.device).split(10):
        draft_KcD = draft_KTD[:, rows].detach().double().requires_grad_()
        teacher_cV = (teacher_TD[rows].double() @ weight_VD.t() / TEMPERATURE).softmax(-1)
        logq_KcV = (draft_KcD @ weight_VD.t() / TEMPERATURE).log_softmax(-1)
        loss = -(weights_KT[:, rows].double() * (teacher_cV * logq_KcV).sum(-1)).sum()
        gradients.append(torch.autograd.grad(loss, draft_KcD)[0])
        total += float(loss)
    return total, torch.cat(gradients, dim=1)


def sampled_drafts(device: torch.device, _folder: Path, vocabulary: str) -> Figure:
    """The gradient of the distance that sampled drafts are trained with, where rollouts use top-k and top-p."""
    vocab_size, num_rows = sizes(device, vocabulary)
    draft_KTD, teacher_TD, weight_VD, weights_KT = make_inputs(device, vocab_size, num_rows)
    draft_KTD.requires_grad_()
    result = _loss_of(
        (draft_KTD, teacher_TD, weight_VD, weights_KT),
        vocab_size,
        loss_type="tv",
        # Rounding to bf16 would turn the sign of many differences of the two distributions.
        fp32_logits=True,
        top_k=TOP_K,
        top_p=TOP_P,
        samples_drafts=True,
    )
    (gradient_KTD,) = torch.autograd.grad(result.loss, draft_KTD)
    wide_KTD, weight_VD = draft_KTD.detach().double().requires_grad_(), weight_VD[:vocab_size].double()
    teacher_TV = _truncated(teacher_TD.double() @ weight_VD.t() / TEMPERATURE)
    accept_KT = torch.stack(
        [
            torch.minimum((draft_TD @ weight_VD.t() / TEMPERATURE).softmax(-1), teacher_TV).sum(-1)
            for draft_TD in wide_KTD
        ]
    )
    (wanted_KTD,) = torch.autograd.grad(-(weights_KT.double() * accept_KT).sum(), wide_KTD)
    error = float((result.accept_prob_KT - accept_KT).abs().max())
    assert error < ACCEPT_LIMIT, f"a probability of acceptance differs by {error:.1e}"
    return Figure(relative_error(gradient_KTD, wanted_KTD), GRADIENT_LIMIT, "relative", details={"acceptance": error})


def _truncated(logits_TV: Tensor) -> Tensor:
    """Probabilities after top-k, then top-p, by sorting."""
    sorted_TV, order_TV = logits_TV.sort(-1, descending=True)
    sorted_TV[:, TOP_K:] = -torch.inf
    probs_TV = sorted_TV.softmax(-1)
    # A token stays if those before it have less than TOP_P together.
    probs_TV = probs_TV.masked_fill(probs_TV.cumsum(-1) - probs_TV >= TOP_P, 0.0)
    return torch.zeros_like(probs_TV).scatter(-1, order_TV, probs_TV / probs_TV.sum(-1, keepdim=True))


def logprobs(device: torch.device, _folder: Path, vocabulary: str, fp32_logits: bool, limit: float) -> Figure:
    """The policy's log-probs and their gradient."""
    vocab_size, num_rows = sizes(device, vocabulary)
    (hidden_TD, *_), _, weight_VD, _ = make_inputs(device, vocab_size, num_rows)
    generator = torch.Generator(device).manual_seed(1)
    targets_T = torch.randint(vocab_size, (NUM_TOKENS,), device=device, generator=generator)
    upstream_T = torch.randn(NUM_TOKENS, device=device, generator=generator)
    hidden_TD.requires_grad_()
    options: dict[str, Any] = {"vocab_size": vocab_size, "temperature": TEMPERATURE, "chunk_size": CHUNK_SIZE}
    got_T = vocab_parallel_logprobs(
        hidden_TD, weight_VD, targets_T, group=None, fp32_logits=fp32_logits, **options
    ).logprobs_T
    (gradient_TD,) = torch.autograd.grad(got_T, hidden_TD, upstream_T.to(got_T))
    wide_TD = hidden_TD.detach().double().requires_grad_()
    logits_TV = wide_TD @ weight_VD[:vocab_size].double().t() / TEMPERATURE
    wanted_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    (wanted_TD,) = torch.autograd.grad(wanted_T, wide_TD, upstream_T.double())
    gradient_error = relative_error(gradient_TD, wanted_TD)
    assert gradient_error < GRADIENT_LIMIT, f"the gradient differs by {gradient_error:.1e}"
    error = float((got_T.double() - wanted_T).abs().max())
    return Figure(error, limit, "nats", details={"gradient": gradient_error})


LOSSES = [
    Check(
        f"draft loss {vocabulary}",
        f"the draft's loss and gradient at {num_tokens:,} tokens",
        partial(soft_ce, vocabulary=vocabulary),
    )
    for vocabulary, (num_tokens, _) in VOCABULARIES.items()
]
LOSSES.append(
    Check(
        "sampled drafts 152k",
        "loss_type tv, its gradient and acceptance, with top-k and top-p at 151,936 tokens",
        partial(sampled_drafts, vocabulary="152k"),
    )
)
LOGPROBS = [
    Check(
        "fp32 head",
        "log-probs with fp32_output_head at 151,936 tokens",
        partial(logprobs, vocabulary="152k", fp32_logits=True, limit=FP32_LIMIT),
    ),
    Check(
        "log-probs 248k",
        "log-probs at 248,077 tokens, logits rounded to bf16",
        partial(logprobs, vocabulary="248k", fp32_logits=False, limit=LOGPROB_LIMIT),
    ),
]
