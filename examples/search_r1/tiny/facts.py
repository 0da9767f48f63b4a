"""Invented facts: places with a river and a king. Nobody can know them, so they must be looked up.

    python examples/search_r1/tiny/facts.py          # writes corpus.jsonl, train.jsonl and validation.jsonl beside it

A question is ``river of Vodar?``. The policy may guess, which hardly ever pays, or search first:

    <search>Vodar</search>
        <information>{"result": "Doc 1: Vodar: river Bes, king Meluk.\\n"}</information>
    <answer>Bes</answer>

The answer of the search is skyrl-gym's, and its reward too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELATIONS = ("river", "king")
NUM_TRAIN_PLACES, NUM_VALIDATION_PLACES = 1024, 64
# Places of the corpus. Those of the warm start come from other seeds.
CORPUS_SEED = 1_000_003

CONSONANTS, VOWELS, _LAST = "BDFGKLMNPRSTVZ", "aeiou", "dklmnrst"


@dataclass(frozen=True)
class Place:
    name: str
    facts: dict[str, str]

    @property
    def passage(self) -> str:
        return f"{self.name}: {', '.join(f'{relation} {value}' for relation, value in self.facts.items())}."


def invented_name(rng: random.Random, syllables: int) -> str:
    parts = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)]
    return "".join(parts).capitalize() + rng.choice(_LAST)


def places(seed: int) -> Iterator[Place]:
    """Endless places of different names."""
    rng, seen = random.Random(seed), set()
    while True:
        name = invented_name(rng, 2)
        if name not in seen:
            seen.add(name)
            yield Place(name, {relation: invented_name(rng, rng.choice((1, 2))) for relation in RELATIONS})


def question(place: Place, relation: str) -> str:
    return f"{relation} of {place.name}?"


def search(place: Place) -> str:
    """A turn that looks the place up."""
    return f"<search>{place.name}</search>"


def observation(passage: str) -> str:
    """The message of skyrl-gym's search environment to a search that finds this passage."""
    found = json.dumps({"result": f"Doc 1: {passage}\n"})
    return f"\n<information>{found}</information>\n"


def answer(value: str) -> str:
    """A turn that answers."""
    return f"<answer>{value}</answer>"


def row(place: Place, relation: str, split: str, index: int) -> dict[str, Any]:
    """A question in SkyRL's dataset schema."""
    return {
        "prompt": [{"role": "user", "content": question(place, relation)}],
        "env_class": "search",
        "reward_spec": {"method": "rule", "ground_truth": {"target": [place.facts[relation]]}},
        "extra_info": {"split": split, "index": index},
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(one, separators=(",", ":")) + "\n" for one in rows))
    print(f"{path}: {len(rows):,} rows")


def main() -> None:
    source, folder = places(CORPUS_SEED), Path(__file__).parent
    splits = {
        "train": [next(source) for _ in range(NUM_TRAIN_PLACES)],
        "validation": [next(source) for _ in range(NUM_VALIDATION_PLACES)],
    }
    everything = [place for chosen in splits.values() for place in chosen]
    write([{"id": str(n), "contents": place.passage} for n, place in enumerate(everything)], folder / "corpus.jsonl")
    for split, chosen in splits.items():
        asked = [(place, relation) for place in chosen for relation in RELATIONS]
        write([row(*pair, split, index) for index, pair in enumerate(asked)], folder / f"{split}.jsonl")


if __name__ == "__main__":
    main()
