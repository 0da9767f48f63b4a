"""Supervision and acceptance of drafted tokens, against cases worked out by hand."""

from __future__ import annotations

import torch

from skyrl_spec.drafts.align import (
    chain_mask,
    chains_by_base,
    drafted_bases,
    expected_acceptance,
    followed_acceptance,
    shift_right,
)


def test_a_chain_starts_at_a_response_token_and_never_leaves_its_document() -> None:
    # Two documents: tokens 0-4 (response 2-4) and 5-9 (response 7-9, of which 8 is an observation).
    segments = torch.tensor([1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    loss_mask = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    mask = chain_mask(loss_mask, segments, num_depths=3)
    # Depth 1 needs tokens p and p+1 on the response: p = 2, 3. Depth 2 needs p-1 as well: p = 3. Depth 3: none.
    assert mask[0].nonzero()[:, 0].tolist() == [2, 3]
    assert mask[1].nonzero()[:, 0].tolist() == [3]
    assert mask[2].sum() == 0


def test_a_chain_does_not_start_in_the_document_before() -> None:
    """Even if a document begins with a trained token, so that the loss mask does not separate the documents."""
    segments = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2])
    mask = chain_mask(torch.ones_like(segments, dtype=torch.bool), segments, num_depths=2)
    assert mask[0].nonzero()[:, 0].tolist() == [1, 2, 5, 6]
    assert mask[1].nonzero()[:, 0].tolist() == [2, 6]


def test_the_first_chain_starts_at_the_last_prompt_token() -> None:
    segments = torch.ones(8, dtype=torch.long)
    loss_mask = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    mask = chain_mask(loss_mask, segments, num_depths=2)
    # Base t = p - d. The token after the base is the first sampled one, token 3.
    assert mask[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert (mask[1].nonzero()[:, 0] - 2).tolist() == [2, 3, 4]


def test_shift_right_fills_with_zero_both_ways() -> None:
    x = torch.tensor([1, 2, 3])
    assert shift_right(x, 1).tolist() == [0, 1, 2]
    assert shift_right(x, -2).tolist() == [3, 0, 0]
    assert shift_right(x, 0).tolist() == [1, 2, 3]
    # Packs may be shorter than a chain.
    assert shift_right(x, 5).tolist() == shift_right(x, -5).tolist() == [0, 0, 0]


def test_a_chain_is_read_from_its_base() -> None:
    values = torch.arange(10).view(2, 5)
    # Depth 1 of base 0 is at target position 1, depth 2 at 2.
    assert chains_by_base(values)[:, 0].tolist() == [1, 7]


def test_expected_acceptance_is_what_rejection_sampling_accepts() -> None:
    """A policy whose certainty varies between chains, so that a good draft is followed by good drafts."""
    generator = torch.Generator().manual_seed(0)
    num_chains, num_depths = 200_000, 3
    # The draft proposes token 0. The policy's probability of it is constant in a chain.
    easy = torch.rand(num_chains, generator=generator) < 0.5
    prob = torch.where(easy, 0.95, 0.2).expand(num_depths, num_chains)
    sampled_hit = torch.rand(num_depths, num_chains, generator=generator) < prob
    accepted = (torch.rand(num_depths, num_chains, generator=generator) < prob).cumprod(dim=0).double().mean(dim=1)
    expected = expected_acceptance(prob.double(), sampled_hit).mean(dim=1)
    torch.testing.assert_close(expected, accepted, rtol=0, atol=0.005)
    # A product of probabilities is biased.
    assert (prob.double().mean(dim=1).cumprod(dim=0) - accepted).abs().max() > 0.05


def test_an_engine_begins_behind_what_it_accepted() -> None:
    # Two responses in a row, bases 2..8 and 11..12; K is 2.
    is_base = torch.tensor([2 <= t <= 8 or 11 <= t <= 12 for t in range(14)])
    hits = torch.zeros(2, 14, dtype=torch.bool)
    hits[0, [2, 4, 5, 11]] = True
    hits[1, [2, 3, 5]] = True
    # 2 accepts both, 5 both, 8 none. No chain begins at 3 and 4. 11 accepts one, and 13 is no base.
    assert drafted_bases(hits, is_base).nonzero()[:, 0].tolist() == [2, 5, 8, 11]


def test_bases_are_those_of_a_walk() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.rand(3, 350, generator=generator) < 0.6
    is_base = torch.zeros(350, dtype=torch.bool)
    expected = torch.zeros_like(is_base)
    for row in range(5):
        start, end = 70 * row + 3 + row, 70 * row + 60 - 7 * row
        is_base[start:end] = True
        position = start
        while position < end:
            expected[position] = True
            # Behind a response there is no hit.
            position += 1 + int((hits & is_base)[:, position].long().cumprod(0).sum())
    assert torch.equal(drafted_bases(hits & is_base, is_base), expected)


def test_followed_acceptance_is_that_of_an_engine_which_drafts_beyond_the_end() -> None:
    """Responses with two hard positions each, against an engine that walks through other such responses."""
    generator = torch.Generator().manual_seed(0)
    num_depths, prompt, length, num_rows = 3, 2, 11, 6000
    prob_S = torch.full((prompt + length,), 0.95, dtype=torch.float64)
    prob_S[[5, 9]] = 0.3
    loss_mask = (torch.arange(prompt + length) >= prompt).repeat(num_rows)
    segments = torch.arange(1, num_rows + 1).repeat_interleave(prompt + length)
    mask = chain_mask(loss_mask, segments, num_depths)
    prob = prob_S.repeat(num_rows) * mask
    hit = (torch.rand(prob.shape, generator=generator) < prob) & mask
    accepted_K, num_chains = followed_acceptance(prob, hit, mask, torch.ones_like(loss_mask))

    drafts, accepted = 0, [0] * num_depths
    for draws in torch.rand(num_rows, prompt + length, num_depths, generator=generator).tolist():
        last = prompt
        while last < prompt + length - 1:
            drafts, count = drafts + 1, 0
            # Position ``last + count`` predicts the next drafted token. Tokens beyond the end are rejected.
            while count < num_depths and last + count < prompt + length - 1:
                if draws[last][count] >= prob_S[last + count]:
                    break
                accepted[count] += 1
                count += 1
            last += count + 1
    assert abs(num_chains.item() / drafts - 1) < 0.02
    engine_K = torch.tensor(accepted, dtype=torch.float64) / drafts
    torch.testing.assert_close(accepted_K / num_chains, engine_K, rtol=0, atol=0.015)
    # The average over all chains is biased.
    everywhere_K = expected_acceptance(chains_by_base(prob), chains_by_base(hit))
    everywhere_K = everywhere_K.sum(dim=1) / chains_by_base(mask)[0].sum()
    assert (everywhere_K - engine_K).abs().max() > 0.05
