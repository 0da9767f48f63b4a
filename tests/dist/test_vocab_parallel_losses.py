"""Losses of two gloo processes, each with half of the output weight, against one process with all of it.

``tests/unit`` checks the one process. Padding rows are far larger than token rows, so a padded column that enters a
softmax shows. Both ranks run all cases in one start, because starting them takes most of the time.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_distributed
from torch import Tensor

from skyrl_spec.losses.logprobs import vocab_parallel_logprobs
from skyrl_spec.losses.soft_ce import vocab_parallel_soft_ce

WORLD_SIZE = 2
K, D = 3, 16
# Vocabulary size and padded size. The second shard is full, partly padded (twice), has one token, is all padding.
VOCABULARIES = [(128, 128), (101, 104), (101, 128), (65, 128), (61, 128)]
# Relative and absolute.
TOLERANCE = {
    torch.float32: 1e-5,
    # Partial gradients are rounded to 8 bits before they are summed.
    torch.bfloat16: 3e-2,
}


def make_weight(vocab_size: int, padded_size: int, dtype: torch.dtype) -> Tensor:
    weight_VD = torch.randn(padded_size, D, generator=torch.Generator().manual_seed(0)) / 4
    weight_VD[vocab_size:] = 5.0
    return weight_VD.to(dtype)


def shard_of(weight_VD: Tensor, rank: int) -> Tensor:
    return weight_VD.chunk(WORLD_SIZE)[rank].clone().requires_grad_()


def check_soft_ce(
    rank: int,
    vocab_size: int,
    padded_size: int,
    num_tokens: int,
    loss_type: str,
    dtype: torch.dtype,
    **rollouts: Any,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    draft_KTD = torch.randn(K, num_tokens, D, generator=generator).to(dtype)
    teacher_TD = draft_KTD[0] + (0.3 * torch.randn(num_tokens, D, generator=generator)).to(dtype)
    weights_KT = torch.rand(K, num_tokens, generator=generator)
    weights_KT[:, 1::4] = 0
    labels_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    weight_VD = make_weight(vocab_size, padded_size, dtype)

    def run(weight_vD: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        hidden_KTD = draft_KTD.clone().requires_grad_()
        result = vocab_parallel_soft_ce(
            hidden_KTD, teacher_TD, weight_vD, weights_KT, vocab_size=vocab_size, temperature=0.7, chunk_size=4,
            group=group, loss_type=loss_type, topk=5, labels_T=labels_T, **rollouts,
        )  # fmt: skip
        result.loss.backward()
        assert hidden_KTD.grad is not None
        return *result, hidden_KTD.grad

    sharded, whole = run(shard_of(weight_VD, rank), dist.group.WORLD), run(weight_VD, None)
    for actual, expected in zip(sharded, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_logprobs(rank: int, vocab_size: int, padded_size: int, num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, D, generator=generator).to(dtype)
    targets_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    weights_T = torch.randn(num_tokens, generator=generator)
    weight_VD = make_weight(vocab_size, padded_size, dtype)

    def run(weight_vD: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs_TD = hidden_TD.clone().requires_grad_()
        result = vocab_parallel_logprobs(
            inputs_TD, weight_vD, targets_T, vocab_size=vocab_size, temperature=0.7, chunk_size=4, group=group
        )
        (weights_T * result.logprobs_T).sum().backward()
        assert inputs_TD.grad is not None
        assert weight_vD.grad is not None
        return *result, inputs_TD.grad, weight_vD.grad

    *sharded, grad_vD = run(shard_of(weight_VD, rank), dist.group.WORLD)
    *whole, grad_VD = run(weight_VD.clone().requires_grad_(), None)
    for actual, expected in zip([*sharded, grad_vD], [*whole, grad_VD.chunk(WORLD_SIZE)[rank]], strict=True):
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_all_cases(rank: int) -> None:
    for vocab_size, padded_size in VOCABULARIES:
        for num_tokens in (0, 1, 7, 13):
            check_logprobs(rank, vocab_size, padded_size, num_tokens, torch.float32)
            for loss_type in ("soft_ce", "topk_soft_ce", "hard_ce", "tv"):
                check_soft_ce(rank, vocab_size, padded_size, num_tokens, loss_type, torch.float32)
        for loss_type, top_k, top_p in (("soft_ce", 5, 1.0), ("tv", -1, 0.9), ("topk_soft_ce", 30, 0.8)):
            rollouts = {"top_k": top_k, "top_p": top_p, "samples_drafts": True}
            check_soft_ce(rank, vocab_size, padded_size, 13, loss_type, torch.float32, **rollouts)
    check_logprobs(rank, 101, 104, 13, torch.bfloat16)
    check_soft_ce(rank, 101, 104, 13, "hard_ce", torch.bfloat16)


def test_two_ranks_equal_one_process() -> None:
    run_distributed(check_all_cases, WORLD_SIZE)


def fp32_head_errors(rank: int, fp32_logits: bool) -> dict[str, float]:
    """Errors against float64 of two ranks with bf16 inputs: largest absolute ones of values, relative ones of grads."""
    vocab_size, num_tokens = 101, 40
    generator = torch.Generator().manual_seed(3)
    weight_VD = make_weight(vocab_size, 104, torch.float32)
    states = torch.randn(2, num_tokens, D, generator=generator)
    states *= 32 / (states @ weight_VD[:vocab_size].t()).abs().amax(dim=-1, keepdim=True)
    weight_VD, hidden_TD, draft_TD = weight_VD.bfloat16(), *states.bfloat16()
    targets_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    head: dict[str, Any] = {"vocab_size": vocab_size, "temperature": 1.0, "chunk_size": 7}

    def run(
        hidden_TD: Tensor, draft_TD: Tensor, weight_vD: Tensor, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        hidden_TD, draft_TD, weight_vD = (x.detach().requires_grad_() for x in (hidden_TD, draft_TD, weight_vD))
        options = {**head, "group": group, "fp32_logits": fp32_logits}
        tokens = vocab_parallel_logprobs(hidden_TD, weight_vD, targets_T, **options)
        draft = vocab_parallel_soft_ce(
            draft_TD[None], hidden_TD, weight_vD, torch.ones(1, num_tokens) / num_tokens, **options
        )
        tokens.logprobs_T.sum().backward()
        draft.loss.backward()
        values = {"log-probs": tokens.logprobs_T, "entropy": tokens.entropy_T, "cross-entropy": draft.loss_KT}
        grads = {"grad hidden": hidden_TD.grad, "grad weight": weight_vD.grad, "grad draft": draft_TD.grad}
        return {name: tensor.detach().double() for name, tensor in (values | grads).items()}

    actual = run(hidden_TD, draft_TD, shard_of(weight_VD, rank), dist.group.WORLD)
    expected = run(hidden_TD.double(), draft_TD.double(), weight_VD.double(), None)
    expected["grad weight"] = expected["grad weight"].chunk(WORLD_SIZE)[rank]
    return {
        name: float(
            (actual[name] - value).norm() / value.norm() if "grad" in name else (actual[name] - value).abs().max()
        )
        for name, value in expected.items()
    }


def check_fp32_head(rank: int) -> None:
    fp32, rounded = (fp32_head_errors(rank, fp32_logits) for fp32_logits in (True, False))
    for name in ("log-probs", "entropy", "cross-entropy"):
        assert fp32[name] < 1e-4, (name, fp32)
        assert rounded[name] > 1e-2, (name, rounded)
    for name in ("grad hidden", "grad weight", "grad draft"):
        # Gradients are bf16, and so are the operands of their products.
        assert fp32[name] < 6e-3, (name, fp32)
        assert fp32[name] < rounded[name], (name, fp32, rounded)


def test_fp32_logits_of_two_ranks_are_not_rounded() -> None:
    run_distributed(check_fp32_head, WORLD_SIZE)


def check_ranks_tie(rank: int) -> None:
    """Both shards hold the same rows, so the largest logits tie across ranks, and the lower id must win."""
    weight_vD = torch.eye(D)
    hidden_TD = 8.0 * torch.eye(D)[:5]
    result = vocab_parallel_soft_ce(
        hidden_TD[None], hidden_TD, weight_vD, torch.ones(1, 5), vocab_size=2 * D, temperature=1.0, chunk_size=2,
        group=dist.group.WORLD, loss_type="topk_soft_ce", topk=1,
    )  # fmt: skip
    assert result.top1_KT.all()
    assert torch.equal(result.argmax_KT, torch.arange(5)[None])
    # Two equal tokens share the teacher; a top-1 target keeps both, as they tie.
    torch.testing.assert_close(result.accept_prob_KT, torch.full((1, 5), 0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(result.loss_KT, torch.full((1, 5), 2.0).log(), rtol=0, atol=0.01)


def test_ties_across_ranks() -> None:
    run_distributed(check_ranks_tie, WORLD_SIZE)


def fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 fails")
    dist.barrier()


def hang_on_rank_0(rank: int) -> None:
    if rank == 0:
        time.sleep(600)


def test_a_childs_error_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*ValueError: rank 1 fails"):
        run_distributed(fail_on_rank_1, WORLD_SIZE)


def test_a_hang_fails() -> None:
    with pytest.raises(TimeoutError, match="hang_on_rank_0 on 2 processes was not done after 8 s"):
        run_distributed(hang_on_rank_0, WORLD_SIZE, timeout_s=8.0)
