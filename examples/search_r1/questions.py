"""Rows for training from question sets: JSONL or parquet with ``question`` and ``golden_answers``.

    python examples/search_r1/questions.py nq_train.jsonl hotpotqa_train.jsonl --out data/search_train.jsonl

The published sets (Natural Questions, TriviaQA, HotpotQA, 2WikiMultihopQA, ...) have these fields in FlashRAG's form.
Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

INSTRUCTION = (
    "Answer the question. Think first, between <think> and </think>. If you need a fact, write a search query between "
    "<search> and </search>; what is found comes back between <information> and </information>. You may search several "
    "times. Give the final answer, in few words, between <answer> and </answer>.\n\nQuestion: {question}"
)


def row(source: dict[str, Any], where: str) -> dict[str, Any]:
    """A training row. Raises ValueError if ``source`` has no question or no answer."""
    question, answers = source.get("question"), source.get("golden_answers")
    answers = [answers] if isinstance(answers, str) else list(answers or [])
    if not isinstance(question, str) or not question.strip() or not answers:
        raise ValueError(f"{where}: needs a question and golden_answers")
    return {
        "prompt": [{"role": "user", "content": INSTRUCTION.format(question=question.strip())}],
        "env_class": "search",
        "reward_spec": {"method": "rule", "ground_truth": {"target": [str(answer) for answer in answers]}},
        "extra_info": {"source": where},
    }


def read(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a file, each with its place."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return ((source, f"{path.name}:{number}") for number, source in enumerate(rows, start=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        rows = [row(*source) for path in args.files for source in read(path)]
    except (OSError, ValueError) as error:
        parser.exit(2, f"questions.py: error: {error}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(one) + "\n" for one in rows))
    print(f"{args.out}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
