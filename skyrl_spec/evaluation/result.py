"""Results of an evaluation: a table, a JSON object and a recommended number of draft tokens."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from skyrl_spec.evaluation.measure import Measurement, by_position
from skyrl_spec.evaluation.target import Target
from skyrl_spec.settings.schema import SamplingConfig


def table_header() -> str:
    """Titles of the columns of ``table_row``."""
    return (
        f"{'k':>3}{'batch':>7}{'tok/s without':>15}{'with':>8}{'speed-up':>10}{'(range)':>16}{'accept':>8}  by position"
    )


def table_row(measured: Measurement) -> str:
    """Medians over the rounds.

    ``accept`` is the draft acceptance length, ``by position`` the share of drafts accepted up to each position.
    """
    plain, drafted = statistics.median(measured.plain_tok_s), statistics.median(measured.drafted_tok_s)
    spread = f"({min(measured.ratios):.2f} to {max(measured.ratios):.2f})"
    by_position = " ".join(f"{share:.2f}".removeprefix("0") for share in measured.acceptance_by_position)
    return (
        f"{measured.num_tokens:>3}{measured.batch_size:>7}{plain:>15.0f}{drafted:>8.0f}"
        f"{f'{measured.speedup:.2f}x':>10}{spread:>16}{measured.counters.mean_acceptance_length:>8.2f}  {by_position}"
    )


def recommended(results: Sequence[Measurement]) -> dict[int, int]:
    """The fastest number of draft tokens (median) for each batch size. 0 if generating without a draft is faster."""
    best: dict[int, Measurement] = {}
    for measured in results:
        fastest = best.get(measured.batch_size)
        if fastest is None or measured.speedup > fastest.speedup:
            best[measured.batch_size] = measured
    return {size: measured.num_tokens if measured.speedup > 1 else 0 for size, measured in best.items()}


def schedule(results: Sequence[Measurement]) -> list[list[int]]:
    """The recommended numbers as rows [first, last, tokens] of ``generator.speculation.schedule``.

    Between two measured batch sizes, the row ends at their geometric mean. Behind the last, its number goes on.
    """
    numbers = sorted(recommended(results).items())
    rows: list[list[int]] = []
    for index, (size, num_tokens) in enumerate(numbers):
        is_last = index + 1 == len(numbers)
        end = size if is_last else math.isqrt(size * numbers[index + 1][0])
        if rows and rows[-1][2] == num_tokens:
            rows[-1][1] = end
        else:
            rows.append([rows[-1][1] + 1 if rows else 1, end, num_tokens])
    return rows


def schedule_line(results: Sequence[Measurement]) -> str:
    """``schedule`` as a setting, without spaces, ready to paste."""
    return f"generator.speculation.schedule={json.dumps(schedule(results), separators=(',', ':'))}"


def category_lines(results: Sequence[Measurement]) -> list[str]:
    """Acceptance by category and number of tokens, with a header. Empty without categories."""
    rows = [(measured.num_tokens, *item) for measured in results for item in measured.by_category.items()]
    if not rows:
        return []
    width = max(len("category"), *(len(category) for _, category, _ in rows))
    lines = [f"{'k':>3}  {'category':<{width}}{'accept':>8}  by position"]
    for num_tokens, category, counters in rows:
        shares = " ".join(f"{share:.2f}".removeprefix("0") for share in by_position(counters))
        lines.append(f"{num_tokens:>3}  {category:<{width}}{counters.mean_acceptance_length:>8.2f}  {shares}")
    return lines


def recommendation_lines(results: Sequence[Measurement]) -> list[str]:
    """One line per batch size. It names other numbers whose range reaches the median of the fastest one."""
    lines = []
    for size, num_tokens in recommended(results).items():
        here = [measured for measured in results if measured.batch_size == size]
        if num_tokens == 0:
            lines.append(f"batch {size:<5} no draft: generating without a draft was fastest")
            continue
        best = next(measured for measured in here if measured.num_tokens == num_tokens)
        close = [str(m.num_tokens) for m in here if m is not best and max(m.ratios) >= best.speedup]
        also = f"; k={', '.join(close)} {'is' if len(close) == 1 else 'are'} as fast within the range" if close else ""
        lines.append(f"batch {size:<5} k={num_tokens} ({best.speedup:.2f}x{also})")
    return lines


def as_json(
    target: Target, results: Sequence[Measurement], sampling: SamplingConfig, about: Mapping[str, Any]
) -> dict[str, Any]:
    """All measurements as a JSON object. ``about`` adds entries such as date and machine."""
    return {
        "target": target.name,
        "method": target.method,
        "draft": None if target.draft is None else str(target.draft),
        "sampling": asdict(sampling),
        **about,
        "measurements": [
            {
                "num_speculative_tokens": measured.num_tokens,
                "batch_size": measured.batch_size,
                "plain_tok_s": measured.plain_tok_s,
                "drafted_tok_s": measured.drafted_tok_s,
                "speedup": measured.speedup,
                "mean_acceptance_length": measured.counters.mean_acceptance_length,
                "acceptance_rate_by_position": measured.acceptance_by_position,
                "num_drafts": measured.counters.num_drafts,
                "by_category": {
                    category: {
                        "mean_acceptance_length": counters.mean_acceptance_length,
                        "acceptance_rate_by_position": by_position(counters),
                        "num_drafts": counters.num_drafts,
                    }
                    for category, counters in measured.by_category.items()
                },
            }
            for measured in results
        ],
        "recommended_schedule": schedule(results),
        "recommended_num_speculative_tokens": {str(size): count for size, count in recommended(results).items()},
    }
