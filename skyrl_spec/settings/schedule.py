"""Schedules of draft lengths: ``generator.speculation.schedule``."""

from __future__ import annotations

from collections.abc import Sequence


def dense_table(rows: Sequence[Sequence[int]], largest: int) -> list[int]:
    """Drafted tokens for batch size 1, 2, ..., ``largest``.

    ``rows``: [first batch size, last batch size, drafted tokens], ascending. A batch size between two rows has the value
    of the row before, and so have those behind the last row. Those before the first row have its value.
    """
    lengths = [rows[0][2]] * largest
    for first, _, length in rows:
        lengths[first - 1 :] = [length] * len(lengths[first - 1 :])
    return lengths
