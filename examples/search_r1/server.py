"""Retrieval server: answers what skyrl-gym's search environment and Search-R1 ask.

    python examples/search_r1/server.py index --port 8000            # a folder that corpus.py built
    python examples/search_r1/server.py corpus.jsonl --port 8000     # a small corpus, indexed now

POST /retrieve {"query": text, "topk": 3} -> {"result": [[{"document": {"id", "contents"}, "score"}, ...]]}. With
{"queries": [text, ...]} the result has a list for each of them. Scores are always there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from corpus import Index, build
from fastapi import FastAPI
from pydantic import BaseModel, Field


class Question(BaseModel):
    """One query, or several."""

    query: str | None = None
    queries: list[str] = Field(default_factory=list)
    topk: int = Field(default=3, ge=1, le=100)


def make_app(index: Index) -> FastAPI:
    app = FastAPI(title="search_r1")

    # Not async: FastAPI then runs each call in a thread, and a long search blocks no other.
    @app.post("/retrieve")
    def retrieve(question: Question) -> dict[str, Any]:
        queries = question.queries if question.query is None else [question.query, *question.queries]
        return {"result": index.search(queries, question.topk)}

    @app.get("/health")
    def health() -> dict[str, int]:
        return {"passages": index.num_passages}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="folder that corpus.py built, or a small corpus (.jsonl)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    is_corpus = args.index.suffix == ".jsonl" and args.index.is_file()
    if not is_corpus and not args.index.is_dir():
        parser.exit(2, f"server.py: error: {args.index}: no such folder; build it with corpus.py build\n")
    with TemporaryDirectory(prefix="search_r1_") as folder:
        if is_corpus:
            build(args.index, Path(folder))
        index = Index(Path(folder) if is_corpus else args.index)
        uvicorn.run(make_app(index), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
