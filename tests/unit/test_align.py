"""Which drafted tokens are supervised, by hand."""

from __future__ import annotations

import torch

from skyrl_spec.drafts.align import accepted_lengths, chain_mask, document_starts, shift_right


def test_a_chain_starts_at_a_response_token_and_never_leaves_its_document() -> None:
    # Two documents: tokens 0-4 (response 2-4) and 5-9 (response 7-9, of which 8 is an observation), then padding.
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    loss_mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0]], dtype=torch.bool)
    mask = chain_mask(loss_mask, segments, num_depths=3)
    # Depth 1 needs tokens p and p+1 on the response: p = 2, 3. Depth 2 needs p-1 as well: p = 3. Depth 3: none.
    assert mask[0].nonzero()[:, 1].tolist() == [2, 3]
    assert mask[1].nonzero()[:, 1].tolist() == [3]
    assert mask[2].sum() == 0


def test_the_first_chain_starts_at_the_last_prompt_token() -> None:
    segments = torch.ones(1, 8, dtype=torch.long)
    loss_mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = chain_mask(loss_mask, segments, num_depths=2)
    # Base t = p - d; the token after the base is the first that was sampled, token 3.
    assert mask[0].nonzero()[:, 1].tolist() == [3, 4, 5, 6]
    assert (mask[1].nonzero()[:, 1] - 2).tolist() == [2, 3, 4]


def test_shift_right_fills_with_zero_both_ways() -> None:
    x = torch.tensor([[1, 2, 3]])
    assert shift_right(x, 1).tolist() == [[0, 1, 2]]
    assert shift_right(x, -2).tolist() == [[3, 0, 0]]
    assert shift_right(x, 0).tolist() == [[1, 2, 3]]


def test_document_starts() -> None:
    assert document_starts(torch.tensor([[1, 1, 2, 2, 0]])).tolist() == [[True, False, True, False, True]]


def test_accepted_length_is_the_sum_of_products_over_complete_chains() -> None:
    segments = torch.ones(1, 5, dtype=torch.long)
    mask = chain_mask(torch.tensor([[0, 1, 1, 1, 1]], dtype=torch.bool), segments, num_depths=2)
    probs = torch.zeros(2, 1, 5)
    # Bases 0 and 1 have both depths: depth 1 at target t+1, depth 2 at target t+2.
    probs[0, 0, 1], probs[1, 0, 2] = 0.5, 0.25
    probs[0, 0, 2], probs[1, 0, 3] = 1.0, 0.75
    total, count = accepted_lengths(probs, mask)
    assert count == 2
    torch.testing.assert_close(total, torch.tensor((1 + 0.5 + 0.125) + (1 + 1.0 + 0.75), dtype=torch.float64))
