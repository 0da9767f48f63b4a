"""Token weights against explicit sums, and losses that do not depend on sharding."""

from __future__ import annotations

import numpy as np
import pytest

from skyrl_spec.errors import ConfigError
from skyrl_spec.losses.reduce import token_weights

MASK_BS = np.array([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
LOSS_BS = np.arange(16, dtype=np.float64).reshape(4, 4) + 1


def mean_by_hand(reduction: str) -> float:
    rows = [loss[mask] for loss, mask in zip(LOSS_BS, MASK_BS, strict=True)]
    if reduction == "token_mean":
        return float(np.concatenate(rows).mean())
    if reduction == "sequence_mean":
        return float(np.mean([row.mean() for row in rows if len(row)]))
    return float(np.mean([row.sum() / 10 for row in rows]))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_weighted_sum_is_the_mean_also_when_sharded(reduction: str) -> None:
    weights_BS = token_weights(MASK_BS, reduction, max_response_length=10)
    assert weights_BS.dtype == np.float32
    assert not weights_BS[~MASK_BS].any()
    shards = [(weights_BS[rows] * LOSS_BS[rows]).sum() for rows in ([0], [1, 2], [3])]
    assert sum(shards) == pytest.approx(mean_by_hand(reduction), rel=1e-6)


def test_the_three_means_differ_here() -> None:
    means = {mean_by_hand(reduction) for reduction in ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")}
    assert len(means) == 3


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_empty_mask_gives_zeros(reduction: str, shape: tuple[int, int]) -> None:
    weights_BS = token_weights(np.zeros(shape, dtype=bool), reduction, max_response_length=10)
    assert weights_BS.shape == shape
    assert not weights_BS.any()


def test_unknown_reduction_is_one_line_naming_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.algorithm\.loss_reduction='mean' .* token_mean") as error:
        token_weights(MASK_BS, "mean", max_response_length=10)
    assert "\n" not in str(error.value)
