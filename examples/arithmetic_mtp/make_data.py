"""Writes this example's rows in SkyRL's schema: data/{train,validation}.{jsonl,parquet}.

python examples/arithmetic_mtp/make_data.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from task import problems, row

# chain_sum draws problem i of seed s from Random(s + i): seeds apart by more than the problems ever drawn share none.
# The warm start trains on seed 0 onwards and judges itself on 777_000_000 onwards.
VALIDATION_SEED, TRAIN_SEED = 1_500_000_000, 3_000_000_000
NUM_VALIDATION, NUM_TRAIN = 128, 4096

Problem = tuple[str, str]


def splits() -> dict[str, list[Problem]]:
    """Validation, then as many training problems that are not in it."""
    validation = _take(problems(VALIDATION_SEED), NUM_VALIDATION, exclude=set())
    train = _take(problems(TRAIN_SEED), NUM_TRAIN, exclude=set(validation))
    return {"train": train, "validation": validation}


def write(rows: list[dict[str, Any]], stem: Path) -> None:
    """The same rows as ``stem.jsonl`` and ``stem.parquet``."""
    lines = (json.dumps(item, separators=(",", ":")) + "\n" for item in rows)
    stem.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), stem.with_suffix(".parquet"), compression="zstd")


def _take(source: Iterator[Problem], count: int, exclude: set[Problem]) -> list[Problem]:
    taken: list[Problem] = []
    while len(taken) < count:
        problem = next(source)
        if problem not in exclude:
            taken.append(problem)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits().items():
        write([row(*pair, split, index) for index, pair in enumerate(pairs)], out / split)
        print(f"{out / split}: {len(pairs)} rows")


if __name__ == "__main__":
    main()
