"""Benchmark of draft lengths chosen by the engine (schedule=auto) against every fixed length and no draft.

    python benchmarks/adaptive.py                          # on two quiet cores, about 40 minutes
    python benchmarks/adaptive.py --examples mtp --sizes 1 16 --rounds 2
    python benchmarks/adaptive.py --examples mtp --mtp-model runs/cpu_mtp_grpo/model       # after make train

Examples: the MTP and the DFlash example's models with their drafts, and the MTP example's with a draft of random
weights. Batches:

- a number: so many requests at a time, from the held-out prompts, until each has ended.
- decay: 256 responses of log-normal length, as a rollout has. They all begin at once and do not end by themselves.

All alternatives take turns in every round: an engine without a draft, and one engine with a draft whose length is
pinned, also to off, or chosen. Their order is random, and a process that was idle first samples a little: otherwise
whoever comes after the other engine would be slower. A rate is a median over rounds, a ratio the median of the ratios
within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from skyrl_spec.controller.placement import num_cores
from skyrl_spec.data.tokenizer import load_tokenizer
from skyrl_spec.drafts.fresh import write_fresh_mtp
from skyrl_spec.rollout.actor import EngineActor, actor_options
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.rollout.step_times import OFF
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.specs.model import load_spec

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = EXAMPLES / "arithmetic_mtp" / "data" / "validation.jsonl"
MOST, LARGEST, LONGEST, DECAYING = 7, 256, 200, 256
SAMPLING = SamplingConfig(max_generate_length=LONGEST)
# An engine without a draft; one whose drafter is off in every step; one that chooses.
NONE, PINNED_OFF, AUTO = "none", "off", "auto"
# Least number of requests in a measurement.
NUM_REQUESTS = 32
# Requests that wake an engine up.
WARMING = 8


class BenchEngine(EngineActor):
    """An engine whose draft length can be pinned, and whose responses can have given lengths."""

    def pin(self, length: int | None) -> None:
        if self._has_schedule:
            self._call_speculation("pin_length", length)

    def tokens_per_s(self, prompts: list[list[int]], batch_size: int, seed: int) -> float:
        """Tokens per second over consecutive batches."""
        self._drop_keys()
        start, num_tokens = time.perf_counter(), 0
        for first in range(0, len(prompts), batch_size):
            groups = self.generate(prompts[first : first + batch_size], SAMPLING, 1, seed + first)
            num_tokens += sum(len(generation.token_ids) for group in groups for generation in group)
        return num_tokens / (time.perf_counter() - start)

    def decaying_tokens_per_s(self, prompts: list[list[int]], lengths: list[int], seed: int) -> float:
        """Tokens per second of one batch whose responses have these lengths."""
        self._drop_keys()
        requests = [self._request(ids, SAMPLING, 1, seed + index) for index, ids in enumerate(prompts)]
        for (_, params), length in zip(requests, lengths, strict=True):
            params.max_tokens, params.ignore_eos = length, True
        start = time.perf_counter()
        self._requests.run([self._requests.add(*request) for request in requests])
        return sum(lengths) / (time.perf_counter() - start)

    def _drop_keys(self) -> None:
        """Drops all cached keys, as a weight sync does."""
        self._llm.reset_prefix_cache()
        if self._has_schedule:
            self._call_speculation("cache_was_reset")


@dataclass
class Rates:
    """Tokens per second of each alternative, an entry a round."""

    tok_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, alternative: str, tok_s: float) -> None:
        self.tok_s.setdefault(alternative, []).append(tok_s)

    def row(self, title: str) -> str:
        medians = {name: statistics.median(rates) for name, rates in self.tok_s.items()}
        fixed = {name: medians[name] for name in sorted(medians) if name.isdigit()}
        best_fixed = max(fixed, key=lambda name: fixed[name])
        best = best_fixed if fixed[best_fixed] > medians[NONE] else NONE
        rates = [medians[NONE], medians[PINNED_OFF], *fixed.values(), medians[AUTO]]
        cells = [title, *(f"{rate:.0f}" for rate in rates)]
        cells += [f"{self._ratio(AUTO, best_fixed):.2f} ({best_fixed})", f"{self._ratio(AUTO, best):.2f} ({best})"]
        cells += [f"{self._ratio(AUTO, NONE):.2f}", f"{self._ratio(PINNED_OFF, NONE):.2f}"]
        return f"| {' | '.join(cells)} |"

    def _ratio(self, one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(self.tok_s[one], self.tok_s[other], strict=True))


def example(name: str, folder: Path, mtp_model: Path) -> tuple[Path, dict[str, Any]]:
    """Model and speculative_config."""
    if name == "dflash":
        home = EXAMPLES / "arithmetic_dflash"
        return home / "model", {"method": "dflash", "model": str(home / "draft"), "num_speculative_tokens": MOST}
    model = mtp_model
    if name == "random":
        write_fresh_mtp(load_spec(str(model)), folder, "fp32", seed=0)
        model = folder
    return model, {"method": "mtp", "num_speculative_tokens": MOST}


@contextmanager
def engine(model: Path, speculative: dict[str, Any] | None) -> Iterator[Any]:
    settings = EngineSettings(
        model_path=str(model), dtype="fp32", device="cpu", max_model_len=32 + LONGEST, max_num_seqs=LARGEST,
        speculative_config=speculative, schedule="auto", weight_sync_backend="ray", enforce_eager=True,
        num_threads=num_cores(), cpu_kvcache_space=1,
    )  # fmt: skip
    handle = ray.remote(BenchEngine).options(**actor_options(settings)).remote(settings)
    ray.get(handle.ping.remote())
    try:
        yield handle
    finally:
        ray.kill(handle)


def load_prompts(model: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(model, "model", None)
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    return [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows]


def compare(name: str, sizes: list[int], rounds: int, mtp_model: Path) -> None:
    """Prints the rows of an example."""
    with tempfile.TemporaryDirectory() as folder:
        model, speculative = example(name, Path(folder), mtp_model)
        prompts = load_prompts(model)
        with engine(model, None) as plain, engine(model, speculative) as drafting:
            start = time.perf_counter()
            ray.get(drafting.calibrate.remote(prompts[:LARGEST], SAMPLING, LARGEST))
            print(f"<!-- {name}: calibrated in {time.perf_counter() - start:.0f} s -->", flush=True)
            lengths = [str(length) for length in range(1, MOST + 1)]
            engines = {NONE: plain, **dict.fromkeys([PINNED_OFF, *lengths, AUTO], drafting)}
            stream = cycle(prompts)
            for size in [*sizes, 0]:
                num_requests = DECAYING if size == 0 else -(-NUM_REQUESTS // size) * size
                rates = Rates()
                # The first round is a warm-up.
                for number in range(-1, rounds):
                    chosen = list(islice(stream, num_requests))
                    for alternative in np.random.default_rng(number + 1).permutation(list(engines)).tolist():
                        tok_s = measure(engines[alternative], alternative, chosen, size, number)
                        if number >= 0:
                            rates.add(alternative, tok_s)
                print(rates.row(f"{name}, {'decay' if size == 0 else size}"), flush=True)


def measure(handle: Any, alternative: str, prompts: list[list[int]], size: int, number: int) -> float:
    pinned = int(alternative) if alternative.isdigit() else OFF if alternative == PINNED_OFF else None
    # Nothing is learned from steps of a pinned length.
    ray.get(handle.pin.remote(OFF))
    ray.get(handle.tokens_per_s.remote(prompts[:WARMING], WARMING, 0))
    ray.get(handle.pin.remote(pinned))
    if size > 0:
        return ray.get(handle.tokens_per_s.remote(prompts, size, 1000 * (number + 1)))
    lengths = np.random.default_rng(number + 1).lognormal(np.log(20), 0.8, len(prompts)).astype(int).clip(1, LONGEST)
    return ray.get(handle.decaying_tokens_per_s.remote(prompts, lengths.tolist(), number + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--examples", nargs="+", choices=["mtp", "dflash", "random"], default=["mtp", "dflash", "random"]
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**power for power in range(8)])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mtp-model", type=Path, default=EXAMPLES / "arithmetic_mtp" / "model")
    args = parser.parse_args()
    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    heads = ["draft, batch", NONE, PINNED_OFF, *(f"k={length}" for length in range(1, MOST + 1)), AUTO]
    heads += ["auto / best fixed", "auto / best", "auto / none", "off / none"]
    print(f"Tokens/s.\n\n| {' | '.join(heads)} |\n|{'---:|' * len(heads)}", flush=True)
    for name in args.examples:
        compare(name, args.sizes, args.rounds, args.mtp_model)


if __name__ == "__main__":
    main()
