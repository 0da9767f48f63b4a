from __future__ import annotations

import pytest

from skyrl_spec.metrics.acceptance import acceptance_metrics
from skyrl_spec.types import SpecCounters

BEFORE = SpecCounters(10, 30, 12, (6, 4, 2))
AFTER = SpecCounters(30, 88, 50, (20, 17, 13))


def test_metrics_come_from_summed_counters() -> None:
    assert acceptance_metrics(AFTER - BEFORE, "vllm/train") == pytest.approx(
        {
            "vllm/train/draft_acceptance_rate": 38 / 58,
            "vllm/train/draft_mean_acceptance_length": 1 + 38 / 20,
            "vllm/train/draft_num_draft_tokens": 58,
            "vllm/train/draft_num_accepted_tokens": 38,
            "vllm/train/draft_acceptance_rate_pos_1": 14 / 20,
            "vllm/train/draft_acceptance_rate_pos_2": 13 / 20,
            "vllm/train/draft_acceptance_rate_pos_3": 11 / 20,
        }
    )


def test_a_rate_counts_the_drafts_that_were_long_enough() -> None:
    counters = SpecCounters(100, 160, 90, (60, 25, 5), (100, 50, 10))
    metrics = acceptance_metrics(counters, "vllm/train")
    rates = {key[-1]: value for key, value in metrics.items() if "_pos_" in key}
    # The third position has too few.
    assert rates == {"1": 0.6, "2": 0.5}
    assert metrics["vllm/train/draft_mean_acceptance_length"] == pytest.approx(1.9)


def test_engines_are_summed_before_dividing() -> None:
    busy, idle = SpecCounters(90, 90, 90, (90,)), SpecCounters(10, 10, 0, (0,))
    assert acceptance_metrics(busy + idle, "vllm/eval")["vllm/eval/draft_mean_acceptance_length"] == pytest.approx(1.9)


def test_counters_of_unlike_depth_combine() -> None:
    assert SpecCounters() + AFTER == AFTER
    assert SpecCounters(0, 0, 0, (0, 0, 0)) == AFTER - AFTER


def test_no_drafts_no_metrics() -> None:
    assert acceptance_metrics(SpecCounters(), "vllm/train") == {}
    assert SpecCounters().mean_acceptance_length == 1.0
