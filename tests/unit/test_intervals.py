"""Confidence intervals against scipy's own test, and the tables of a comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from skyrl_spec.evaluation.compare import interval_table, ratio_table, table
from skyrl_spec.evaluation.intervals import mean_interval, ratio_interval
from skyrl_spec.metrics import names


@pytest.mark.parametrize("num_seeds", [2, 3, 7])
def test_the_interval_is_that_of_a_t_test(num_seeds: int) -> None:
    values, others = np.random.default_rng(num_seeds).uniform(1, 2, (2, num_seeds))
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx(expected)
    paired = stats.ttest_rel(np.log(values), np.log(others)).confidence_interval(0.95)
    ratio = ratio_interval(values, others)
    assert (math.log(ratio.low), math.log(ratio.high)) == pytest.approx(paired)
    assert ratio.mean == pytest.approx(stats.gmean(values / others))


def test_a_single_value_has_no_interval() -> None:
    found = mean_interval([2.0])
    assert found.mean == 2.0
    assert math.isnan(found.low)


def _records(length: float) -> list[dict[str, float]]:
    # Means are of the second half.
    return [{names.STEP: step, names.acceptance_length("train"): length if step > 2 else 9.0} for step in range(1, 5)]


def test_tables() -> None:
    records = {
        "trained": {0: _records(3.0), 1: _records(3.3)},
        "frozen": {0: _records(2.0), 1: _records(2.2)},
        "none": {0: [{names.STEP: 1}], 1: [{names.STEP: 1}]},
    }
    row = next(line for line in interval_table(records) if line.startswith("acceptance length, training"))
    # t with one degree of freedom: 12.706.
    assert row.split()[3:] == ["3.15", "±1.91", "2.10", "±1.27", "-"]
    lines = ratio_table(records)
    assert "ratio to draft frozen" in lines[0]
    row = next(line for line in lines if line.startswith("acceptance length, training"))
    assert row.split()[3:] == ["1.50", "(1.50", "to", "1.50)", "-"]
    single = table({name: {0: by_seed[0]} for name, by_seed in records.items()})
    row = next(line for line in single if line.startswith("acceptance length, training"))
    assert row.split()[3:] == ["9.00", "3.00", "3.00", "9.00", "2.00", "2.00", "-", "-", "-"]
    # Without a frozen arm, the last is the base.
    assert "ratio to draft none" in ratio_table({name: records[name] for name in ("trained", "none")})[0]
