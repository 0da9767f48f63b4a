"""Attention over documents laid end to end, alone and with the keys of chains, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skyrl_spec.drafts.chain_attention import chain_attention
from skyrl_spec.models.flash import Documents

HEADS, GROUPS, HEAD_DIM, SCALE = 4, 2, 8, 0.3
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def definition(query_THd: Tensor, keys: list[Tensor], values: list[Tensor], documents: Documents) -> Tensor:
    """One softmax over the keys of all depths side by side, with a mask."""
    num_tokens = len(query_THd)
    document_T = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths))
    index_T = torch.arange(num_tokens)
    causal_TT = (index_T[None] <= index_T[:, None]) & (document_T[None] == document_T[:, None])
    own_TT = torch.eye(num_tokens, dtype=torch.bool)
    seen_TN = torch.cat([causal_TT, *[own_TT] * (len(keys) - 1)], dim=1)
    key_NHd, value_NHd = (torch.cat(x).repeat_interleave(HEADS // GROUPS, dim=1) for x in (keys, values))
    scores_HTN = torch.einsum("thd,nhd->htn", query_THd, key_NHd) * SCALE
    probs_HTN = scores_HTN.masked_fill(~seen_TN, -torch.inf).softmax(-1)
    return torch.einsum("htn,nhd->thd", probs_HTN, value_NHd)


def ours(query_THd: Tensor, keys: list[Tensor], values: list[Tensor], documents: Documents) -> Tensor:
    return chain_attention(query_THd, keys, values, documents, SCALE)


def make_inputs(num_tokens: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, HEADS, HEAD_DIM), *[(num_tokens, GROUPS, HEAD_DIM)] * (2 * depth)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(attend: object, inputs: list[Tensor], documents: Documents) -> list[Tensor]:
    assert callable(attend)
    leaves = [x.clone().requires_grad_() for x in inputs]
    depth = len(leaves) // 2
    out = attend(leaves[0], leaves[1 : 1 + depth], leaves[1 + depth :], documents)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, upstream.bfloat16().to(out.dtype))]


@pytest.mark.parametrize("lengths", [(7,), (1, 2, 3, 0, 9), (1, 1, 1, 1, 1), (40, 3), (600,)], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_output_and_gradients_are_those_of_the_definition(
    lengths: tuple[int, ...], depth: int, dtype: torch.dtype
) -> None:
    documents = Documents.of(lengths)
    inputs = make_inputs(sum(lengths), depth, dtype)
    got = with_gradients(ours, inputs, documents)
    wanted = with_gradients(definition, [x.double() for x in inputs], documents)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == dtype
        # A query that sees one key has no gradient: rounding is all that it can differ by.
        assert (mine.double() - theirs).norm() <= TOLERANCES[dtype] * (theirs.norm() + 1.0)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_the_last_queries_of_each_document_give_their_rows_of_the_whole(depth: int, dtype: torch.dtype) -> None:
    documents, queries = Documents.of((9, 1, 30, 4)), Documents.of((3, 1, 7, 4))
    inputs = make_inputs(44, depth, dtype)
    rows = torch.tensor([6, 7, 8, 9, *range(33, 40), *range(40, 44)])

    def whole(query: Tensor, keys: list[Tensor], values: list[Tensor], documents: Documents) -> Tensor:
        return definition(query, keys, values, documents)[rows]

    def suffix(query: Tensor, keys: list[Tensor], values: list[Tensor], documents: Documents) -> Tensor:
        keys, values = ([x[0], *(own[rows] for own in x[1:])] for x in (keys, values))
        return chain_attention(query[rows], keys, values, documents, SCALE, queries)

    got = with_gradients(suffix, inputs, documents)
    wanted = with_gradients(whole, [x.double() for x in inputs], documents)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine.double() - theirs).norm() <= TOLERANCES[dtype] * (theirs.norm() + 1.0)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_document_is_the_same_alone_and_in_any_place(depth: int) -> None:
    lengths = (5, 1, 12)
    inputs = make_inputs(sum(lengths), depth, torch.float32)
    together = with_gradients(ours, inputs, Documents.of(lengths))
    order = torch.cat([torch.arange(6, 18), torch.arange(5), torch.arange(5, 6)])
    moved = with_gradients(
        lambda *args: ours(*args)[order.argsort()], [x[order] for x in inputs], Documents.of((12, 5, 1))
    )
    for mine, theirs in zip(moved[1:], together[1:], strict=True):
        torch.testing.assert_close(mine[order.argsort()], theirs, rtol=1e-5, atol=1e-6)


def test_nothing_is_as_large_as_tokens_times_tokens() -> None:
    """Every tensor that autograd keeps for the backward pass is linear in tokens."""
    num_tokens, depth = 512, 3
    leaves = [x.requires_grad_() for x in make_inputs(num_tokens, depth, torch.float32)]
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        ours(leaves[0], leaves[1 : 1 + depth], leaves[1 + depth :], Documents.of((num_tokens,))).sum()
    assert sizes
    assert max(sizes) < num_tokens * num_tokens // 8


def test_no_documents_give_nothing() -> None:
    out = ours(
        *[
            make_inputs(0, 1, torch.float32)[0],
            make_inputs(0, 1, torch.float32)[1:2],
            make_inputs(0, 1, torch.float32)[2:],
        ],
        Documents.of(()),
    )
    assert out.shape == (0, HEADS, HEAD_DIM)
