"""Packs divided over gloo processes: attention, gathered rows and reach, against the whole pack in one process.

All ranks run all cases in one start, because starting them takes most of the time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawn import run_distributed
from torch import Tensor

from skyrl_spec.models.context_parallel import (
    ContextRanks,
    Reach,
    gathered,
    placed,
    shared_attention,
)
from skyrl_spec.models.flash import documents_attention
from skyrl_spec.models.pack import Pack, pack_documents

HEADS, GROUPS, HEAD_DIM, SCALE = 4, 2, 8, 0.3
# One document over all chunks; borders inside and between documents; one-token documents; fewer tokens than chunks.
PACKS = [(64,), (5, 40, 3), (16, 16, 16), (1,) * 11, (1, 30, 1, 1), (2,), (7,)]


def _pack(lengths: tuple[int, ...]) -> Pack:
    num_tokens = sum(lengths)
    return pack_documents(np.arange(num_tokens), np.arange(num_tokens) % 3 > 0, lengths)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_division(whole: Pack, pack: Pack, size: int, multiple: int) -> None:
    assert pack.share is not None
    num_tokens = len(whole.token_ids_T)
    added = len(pack.token_ids_T) - num_tokens
    assert pack.num_own * size == len(pack.token_ids_T)
    assert pack.num_own % (2 * multiple) == 0
    assert 0 <= added < 2 * size * multiple
    # What is added is part of the last document, and has no loss.
    assert pack.documents.lengths == (*whole.documents.lengths[:-1], whole.documents.lengths[-1] + added)
    assert not pack.loss_mask_T[num_tokens:].any()
    again = pack_documents(pack.token_ids_T.numpy(), pack.loss_mask_T.numpy(), pack.documents.lengths)
    for name in ("token_ids_T", "loss_mask_T", "segment_ids_T", "position_T"):
        assert torch.equal(getattr(again, name), getattr(pack, name)), name
        assert torch.equal(getattr(pack, name)[:num_tokens], getattr(whole, name)), name
    owners = pack.share.owners(np.arange(len(pack.token_ids_T)))
    assert np.array_equal(np.flatnonzero(owners == pack.share.rank), np.sort(pack.share.positions))
    assert torch.equal(pack.own(torch.arange(len(owners))), torch.from_numpy(pack.share.positions))


def _check_attention(pack: Pack) -> None:
    share = pack.share
    assert share is not None
    num_tokens = len(pack.token_ids_T)
    heads = (HEADS, GROUPS, GROUPS)
    whole = [_random(num_tokens, count, HEAD_DIM, seed=index).requires_grad_() for index, count in enumerate(heads)]
    upstream = _random(num_tokens, HEADS, HEAD_DIM, seed=9)
    wanted = documents_attention(*whole, pack.documents, SCALE)
    wanted_grads = torch.autograd.grad(wanted, whole, upstream)
    own = [pack.own(x.detach()).clone().requires_grad_() for x in whole]
    out = shared_attention(*own, share, SCALE)
    grads = torch.autograd.grad(out, own, pack.own(upstream))
    for mine, theirs in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(mine, pack.own(theirs), rtol=1e-12, atol=1e-12)


def _check_rows(pack: Pack, num_behind: int) -> None:
    share = pack.share
    assert share is not None
    num_tokens = len(pack.token_ids_T)
    x_TD = _random(num_tokens, 3, seed=0)
    own_tD = pack.own(x_TD).clone().requires_grad_()
    all_TD = gathered(own_tD, share)
    assert torch.equal(all_TD, x_TD)
    # Each rank reads the rows with weights of its own.
    weight_T1 = _random(num_tokens, 1, seed=1) * (1 + share.rank)
    (grad,) = torch.autograd.grad((all_TD * weight_T1).sum(), own_tD)
    total = _random(num_tokens, 1, seed=1) * sum(range(1, share.size + 1))
    torch.testing.assert_close(grad, pack.own(total).expand(-1, 3))

    reach = Reach.of(pack, num_behind)
    rows_XD, behind = reach.rows(own_tD, share).detach(), torch.zeros(num_behind, 3, dtype=torch.float64)
    for chunk in share.chunks:
        positions = torch.arange(chunk.tokens.start, chunk.tokens.stop + num_behind)
        assert torch.equal(rows_XD[reach.row_P[positions]], torch.cat([x_TD, behind])[positions])

    owners = share.owners(np.arange(num_tokens))
    own_n = torch.from_numpy(np.flatnonzero(owners == share.rank))
    mine = x_TD.T[:, own_n].clone().requires_grad_()
    everywhere = placed(mine, own_n, num_tokens, share)
    assert torch.equal(everywhere, x_TD.T)
    # All ranks compute the same of it, so that the gradient is that of one.
    (grad,) = torch.autograd.grad((everywhere * weight_T1[:, 0]).sum(), mine)
    assert torch.equal(grad, weight_T1[own_n, 0].expand(3, -1))


def _check(rank: int, size: int) -> None:
    for lengths in PACKS:
        for multiple in (1, 2):
            ranks = ContextRanks(dist.group.WORLD, rank, size, multiple)
            whole = _pack(lengths)
            pack = ranks.divide(whole)
            _check_division(whole, pack, size, multiple)
            _check_attention(pack)
            for num_behind in (1, 3, 20):
                _check_rows(pack, num_behind)


# Three, so that no power of two hides an order of ranks that is wrong.
@pytest.mark.parametrize("size", [2, 3])
def test_divided_packs_compute_what_whole_ones_do(size: int) -> None:
    run_distributed(_check, size, size)
