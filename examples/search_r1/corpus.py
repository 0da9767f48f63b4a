"""Index of a corpus for keyword search, and its search.

    python examples/search_r1/corpus.py build corpus.jsonl index      # rows {"id": ..., "contents": ...}
    python examples/search_r1/corpus.py search index "who wrote Dune"

The index is a folder that bm25s reads without loading it whole, so a corpus may be larger than memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s


class Index:
    """A built index."""

    def __init__(self, folder: Path):
        self._bm25 = bm25s.BM25.load(folder, mmap=True, load_corpus=True)
        self.num_passages = int(self._bm25.scores["num_docs"])

    def search(self, queries: Sequence[str], topk: int) -> list[list[dict[str, Any]]]:
        """For each query its best passages, ``{"document": {"id", "contents"}, "score"}``, best first.

        Passages that share no word with the query are left out.
        """
        if not queries:
            return []
        tokens = bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
        found, scores = self._bm25.retrieve(tokens, k=min(topk, self.num_passages), show_progress=False)
        return [
            [{"document": passage, "score": float(score)} for passage, score in zip(*row, strict=True) if score > 0]
            for row in zip(found, scores, strict=True)
        ]


def build(corpus: Path, folder: Path) -> int:
    """Writes the index of a JSONL file; returns the number of passages.

    Raises:
        ValueError: a row is no passage; the message names it.
    """
    passages = [_passage(line, f"{corpus}:{number}") for number, line in enumerate(corpus.open(), start=1)]
    if not passages:
        raise ValueError(f"{corpus}: has no passage")
    bm25 = bm25s.BM25()
    texts = [passage["contents"] for passage in passages]
    bm25.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    bm25.save(folder, corpus=passages)
    return len(passages)


def _passage(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
        return {"id": str(row["id"]), "contents": str(row["contents"])}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: must be {{"id": ..., "contents": ...}} ({error!r})') from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    builds = commands.add_parser("build")
    builds.add_argument("corpus", type=Path)
    builds.add_argument("index", type=Path)
    searches = commands.add_parser("search")
    searches.add_argument("index", type=Path)
    searches.add_argument("query")
    searches.add_argument("--topk", type=int, default=3)
    args = parser.parse_args()
    if args.command == "build":
        try:
            print(f"{args.index}: {build(args.corpus, args.index):,} passages")
        except (OSError, ValueError) as error:
            parser.exit(2, f"corpus.py: error: {error}\n")
        return
    for hit in Index(args.index).search([args.query], args.topk)[0]:
        print(f"{hit['score']:.2f}  {hit['document']['id']}  {hit['document']['contents'][:200]}")


if __name__ == "__main__":
    main()
