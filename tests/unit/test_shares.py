"""What is drawn for a step: every position equally often, and an average over chains that stays the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skyrl_spec.drafts.align import chain_mask, followed_acceptance
from skyrl_spec.drafts.shares import StepRandom, draw_numbers, draw_windows, mean_number, mean_window, systematic_round

NUM_DRAWS = 4000


def _rows(*lengths: int) -> np.ndarray:
    """Candidates from the third token on. The second row has a gap."""
    is_candidate = np.arange(max(lengths) + 4) < np.asarray(lengths)[:, None] + 2
    is_candidate[:, :2] = False
    is_candidate[1, 5:8] = False
    return is_candidate


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5, 0.9])
def test_every_candidate_is_in_a_window_equally_often(share: float) -> None:
    is_candidate, random = np.tile(_rows(200, 60, 5, 0, 1, 33), (4, 1)), StepRandom(0)
    drawn, index = np.zeros(is_candidate.shape), np.arange(is_candidate.shape[1])
    for _ in range(NUM_DRAWS):
        windows = draw_windows(is_candidate, share, 4, random.next_step())
        in_window = (windows.begin_B[:, None] <= index) & (index < windows.end_B[:, None])
        assert is_candidate[np.flatnonzero(in_window.any(axis=1)), windows.begin_B[in_window.any(axis=1)]].all()
        drawn += in_window & is_candidate
    rate = drawn[is_candidate] / NUM_DRAWS
    deviation = (share * (1 - share) / NUM_DRAWS) ** 0.5
    assert abs(rate - share).max() < 5 * deviation


def test_all_candidates_are_in_the_windows_of_the_whole_share() -> None:
    is_candidate = _rows(40, 60, 5, 0, 1, 33)
    windows = draw_windows(is_candidate, 1.0, 4, np.random.default_rng(0))
    index = np.arange(is_candidate.shape[1])
    in_window = (windows.begin_B[:, None] <= index) & (index < windows.end_B[:, None])
    assert (in_window >= is_candidate).all()
    assert (windows.counted_B == windows.begin_B).all()
    assert windows.begin_B[3] == windows.end_B[3]
    # First to last candidate, the gap between them included.
    assert in_window.sum(axis=1).tolist() == [40, 60, 5, 0, 1, 33]


def test_windows_of_long_rows_are_as_long_as_the_share_and_of_short_rows_drawn_whole() -> None:
    windows = [draw_windows(_rows(1000, 20), 0.1, 4, np.random.default_rng(seed)) for seed in range(200)]
    lengths = np.stack([window.end_B - window.begin_B for window in windows])
    assert lengths[:, 0].max() == 111  # 0.1 * 999 / 0.9
    assert lengths[:, 0].min() > 0
    assert (lengths[:, 1] == 0).mean() > 0.8
    assert lengths[:, 1].max() == 20


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_numbers_are_their_means_rounded(share: float) -> None:
    num, random = np.array([128, 40, 3, 0, 8]), StepRandom(1)
    numbers = np.stack([draw_numbers(num, share, random.next_step()) for _ in range(NUM_DRAWS)])
    assert numbers.mean(axis=0) == pytest.approx(share * num, rel=0.1)
    assert (abs(numbers - share * num) < 1).all()
    assert draw_numbers(num, 1.0, np.random.default_rng(0)).tolist() == num.tolist()


def test_rounded_means_keep_their_sum_and_are_never_all_zero() -> None:
    expected = np.random.default_rng(0).random(500)
    rounded = systematic_round(expected, np.random.default_rng(1))
    assert abs(rounded.cumsum() - expected.cumsum()).max() < 1
    for seed in range(100):
        assert systematic_round(np.array([0.01, 0.0, 0.02]), np.random.default_rng(seed)).sum() == 1
    assert systematic_round(np.zeros(3), np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_a_step_is_drawn_again_after_its_number_is_restored() -> None:
    random = StepRandom(7)
    random.next_step()
    drawn = random.next_step().random(4)
    again = StepRandom(7)
    again.num_steps = 1
    assert again.next_step().random(4).tolist() == drawn.tolist()
    assert again.next_step().random(4).tolist() != drawn.tolist()


@pytest.mark.parametrize(("num", "share"), [(1000, 0.1), (20, 0.1), (300, 1.0)])
def test_the_means_are_those_of_many_draws(num: int, share: float) -> None:
    is_candidate, random = np.ones((40, num), bool), StepRandom(0)
    ends, lengths, numbers = [], [], []
    for _ in range(400):
        windows = draw_windows(is_candidate, share, 4, random.next_step())
        is_drawn = windows.end_B > windows.begin_B
        ends += windows.end_B[is_drawn].tolist()
        lengths += (windows.end_B - windows.begin_B)[is_drawn].tolist()
        numbers += draw_numbers(np.full(40, num), share, random.next_step()).tolist()
    probability, first, end = mean_window(num, share)
    assert len(ends) / 16000 == pytest.approx(probability, rel=0.1)
    assert np.mean(ends) == pytest.approx(end, rel=0.03)
    assert np.mean(lengths) == pytest.approx(end - first, rel=0.03)
    probability, mean = mean_number(num, share)
    assert np.mean(np.array(numbers) > 0) == pytest.approx(probability, rel=0.05)
    assert np.mean(numbers) == pytest.approx(probability * mean, rel=0.05)


@pytest.mark.parametrize("hit_rate", [0.5, 0.95])
def test_chains_followed_through_windows_are_accepted_as_in_whole_responses(hit_rate: float) -> None:
    """Windows of a hundredth of a response, drawn many times, give the mean of the whole within one percent."""
    num_depths, num_tokens, rng = 3, 3000, np.random.default_rng(0)
    # Wrong tokens come in runs, so that acceptance depends on where an engine begins.
    runs = rng.integers(1, 12, num_tokens)
    rate_T = np.repeat(np.where(rng.random(num_tokens) < hit_rate, 0.97, 0.3), runs)[:num_tokens]
    is_right = rng.random(num_tokens) < rate_T
    loss_mask_T, segment_ids_T = torch.ones(num_tokens, dtype=torch.bool), torch.ones(num_tokens, dtype=torch.long)
    loss_mask_T[:5] = False
    whole_KT = chain_mask(loss_mask_T, segment_ids_T, num_depths)
    # By target position: the drafted token is the next one.
    hit_T = torch.from_numpy(np.append(is_right[1:], False))

    def acceptance(mask_KT: torch.Tensor, is_counted_T: torch.Tensor) -> torch.Tensor:
        hit_KT = hit_T & mask_KT
        accepted_K, num_chains = followed_acceptance(hit_KT.double(), hit_KT, mask_KT, is_counted_T)
        return torch.stack([accepted_K.sum(), num_chains])

    everything = torch.ones_like(loss_mask_T)
    accepted, chains = acceptance(whole_KT, everything).tolist()
    is_base = np.zeros((1, num_tokens), bool)
    is_base[0, :-2] = (loss_mask_T[1:-1] & loss_mask_T[2:]).numpy()
    index_T, random, total = torch.arange(num_tokens), StepRandom(0), torch.zeros(2, dtype=torch.float64)
    for _ in range(1500):
        windows = draw_windows(is_base, 0.008, 2 * (num_depths + 1), random.next_step())
        begin, end, counted = (int(x[0]) for x in (windows.begin_B, windows.end_B, windows.counted_B))
        assert end - begin <= 32
        in_window = (index_T >= begin) & (index_T < end)
        bases_KT = torch.stack([torch.roll(in_window, depth) for depth in range(1, num_depths + 1)])
        total += acceptance(whole_KT & bases_KT, index_T >= counted)
    assert float(total[0] / total[1]) == pytest.approx(accepted / chains, rel=0.01)
    assert float(total[1]) > 5000
