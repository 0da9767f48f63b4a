"""Token weights that carry the global denominator, so that a loss is a plain sum over ranks and micro-batches.

Numpy only: the driver computes them.
"""

from __future__ import annotations

import numpy as np

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.allowed import LOSS_REDUCTIONS


def token_weights(loss_mask_BS: np.ndarray, reduction: str, max_response_length: int) -> np.ndarray:
    """Weights ``w`` such that ``sum(w * token_loss)`` over all ranks and micro-batches is the mean of ``reduction``.

    - ``token_mean``: 1 / (tokens of all sequences)
    - ``sequence_mean``: 1 / (sequences with at least one token * tokens of this sequence)
    - ``seq_mean_token_sum_norm``: 1 / (sequences * max_response_length); every row of the mask is a sequence

    Args:
        loss_mask_BS: bool, True at tokens that are trained on. The global mini-batch, before it is sharded.
        reduction: one of the above.
        max_response_length: most tokens of a response; for ``seq_mean_token_sum_norm``.

    Returns:
        [B, S] float32, 0 outside the mask.

    Raises:
        ConfigError: ``reduction`` is unknown.
    """
    if reduction not in LOSS_REDUCTIONS:
        raise ConfigError(
            f"trainer.algorithm.loss_reduction={reduction!r} is unknown; allowed are {', '.join(LOSS_REDUCTIONS)}; "
            "set one of these"
        )
    mask_BS = np.asarray(loss_mask_BS, dtype=bool)
    tokens_B = mask_BS.sum(axis=1)
    if reduction == "token_mean":
        denominator_B = np.full(len(tokens_B), tokens_B.sum())
    elif reduction == "sequence_mean":
        denominator_B = (tokens_B > 0).sum() * tokens_B
    else:
        assert max_response_length > 0
        denominator_B = np.full(len(tokens_B), len(tokens_B) * max_response_length)
    # A row without tokens has no entry in the mask. Its denominator has no effect, but must not be 0.
    return (mask_BS / np.maximum(denominator_B, 1)[:, None]).astype(np.float32)
