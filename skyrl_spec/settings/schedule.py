"""Schedules of draft lengths: ``generator.speculation.schedule``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl_spec.errors import ConfigError

SETTING = "generator.speculation.schedule"
_KINDS = "must be fixed, auto, or a table of rows [first, last, tokens]"


def check_schedule(schedule: Any, most: int | None) -> None:
    """Checks a schedule.

    Args:
        most: tokens that the draft can draft at a time. None: not known yet.

    Raises:
        ConfigError: no such schedule, or a table whose rows overlap, are not ascending, or draft more than ``most``.
    """
    if schedule in ("fixed", "auto"):
        return
    if not isinstance(schedule, list) or not schedule:
        shown = "null" if schedule is None else schedule
        raise ConfigError(f"{SETTING}={shown}: {_KINDS}; set one of these")
    before = 0
    for row in schedule:
        if not (isinstance(row, list) and len(row) == 3 and all(type(number) is int for number in row)):
            raise ConfigError(f"{SETTING}={schedule}: {_KINDS}, and {row} is no such row; change it")
        first, last, tokens = row
        if not before < first <= last:
            raise ConfigError(
                f"{SETTING}={schedule}: row {row} must begin above {before}, where the one before ends, and end at or "
                "above its own beginning; change it"
            )
        if tokens < 0 or (most is not None and tokens > most):
            range_ = "at least 0" if most is None else f"from 0 to num_speculative_tokens={most}"
            raise ConfigError(f"{SETTING}={schedule}: row {row} must draft {range_} tokens; change it")
        before = last


def dense_table(rows: Sequence[Sequence[int]], largest: int) -> list[int]:
    """Drafted tokens for batch size 1, 2, ..., ``largest``.

    ``rows``: [first batch size, last batch size, drafted tokens], ascending. A batch size between two rows, or behind
    the last, has the value of the row before. Those before the first row have its value.
    """
    lengths = [rows[0][2]] * largest
    for first, _, length in rows:
        lengths[first - 1 :] = [length] * len(lengths[first - 1 :])
    return lengths
