"""Rollout throughput with and without the draft: two engines of the same build, same prompts, in turns.

    python benchmarks/rollout.py --model examples/arithmetic_mtp/model --k 3
    python benchmarks/rollout.py --model examples/arithmetic_dflash/model --draft examples/arithmetic_dflash/draft --k 7

The draft is the model's own MTP head, or the DFlash draft in a directory.
Prints a Markdown table: tokens/s without and with the draft (medians over the rounds), their ratio in the same round
(median, lowest and highest), and the mean acceptance length, by the number of rollouts generated at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from transformers import AutoTokenizer

from skyrl_spec.config import SamplingConfig
from skyrl_spec.data.dataset import load_prompts
from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine import EngineSettings
from skyrl_spec.trainer.placement import ray_session
from skyrl_spec.types import Generation, SpecCounters

EXAMPLE = Path(__file__).parents[1] / "examples" / "arithmetic_mtp"
# Calls of one measurement generate this many rollouts in all, so that small batches are measured long enough too.
ROLLOUTS_PER_MEASUREMENT = 16


@dataclass
class Result:
    """Measurements at one batch size, an entry a round."""

    plain_tokens_s: list[float] = field(default_factory=list)
    drafted_tokens_s: list[float] = field(default_factory=list)
    counters: SpecCounters = field(default_factory=SpecCounters)

    def row(self, batch_size: int) -> str:
        ratios = [drafted / plain for drafted, plain in zip(self.drafted_tokens_s, self.plain_tokens_s, strict=True)]
        return (
            f"| {batch_size} | {statistics.median(self.plain_tokens_s):.0f} "
            f"| {statistics.median(self.drafted_tokens_s):.0f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {self.counters.mean_acceptance_length:.2f} |"
        )


def start_engine(args: argparse.Namespace, num_speculative_tokens: int) -> ActorHandle:
    """An engine with that many draft tokens; 0: without a draft."""
    draft: dict[str, Any] | None = None
    if num_speculative_tokens:
        method = {"method": "mtp"} if args.draft is None else {"method": "dflash", "model": str(args.draft)}
        draft = method | {"num_speculative_tokens": num_speculative_tokens}
    settings = EngineSettings(
        model_path=str(args.model),
        dtype=args.dtype,
        device=args.device,
        max_model_len=args.max_prompt_length + args.max_generate_length,
        max_num_seqs=max(args.batch_sizes),
        enforce_eager=args.enforce_eager,
        speculative_config=draft,
        weight_sync_backend="ray" if args.device == "cpu" else "nccl",
        num_threads=args.num_threads if args.device == "cpu" else None,
    )
    # Ray's decorator adds ``options``, which its types do not say.
    actor_class: Any = RolloutActor
    return actor_class.options(**actor_options(settings)).remote(settings)


def measure(engine: ActorHandle, prompts: list[list[int]], batch_size: int, sampling: SamplingConfig) -> float:
    """Generated tokens per second over calls of ``batch_size`` rollouts, one after the other."""
    num_tokens, elapsed_s = 0, 0.0
    for start in range(0, len(prompts), batch_size):
        begin = time.perf_counter()
        groups: list[list[Generation]] = ray.get(
            engine.generate.remote(prompts[start : start + batch_size], sampling, 1, None)
        )
        elapsed_s += time.perf_counter() - begin
        num_tokens += sum(len(generation.token_ids) for group in groups for generation in group)
    return num_tokens / elapsed_s


def run(args: argparse.Namespace) -> dict[int, Result]:
    """All measurements. Only one engine generates at a time, and which one goes first changes every round."""
    plain, drafted = start_engine(args, 0), start_engine(args, args.k)
    ray.get([plain.ping.remote(), drafted.ping.remote()])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    loaded = load_prompts(
        [args.data], tokenizer, max_prompt_length=args.max_prompt_length, default_env_class="gsm8k", setting="--data"
    )
    all_prompts = cycle([prompt.token_ids for prompt in loaded.prompts])
    sampling = SamplingConfig(temperature=args.temperature, max_generate_length=args.max_generate_length)
    results = {batch_size: Result() for batch_size in args.batch_sizes}
    for round_index in range(-1, args.rounds):
        for batch_size, result in results.items():
            prompts = list(islice(all_prompts, max(batch_size, ROLLOUTS_PER_MEASUREMENT)))
            before = ray.get(drafted.spec_counters.remote())
            order = [plain, drafted] if round_index % 2 == 0 else [drafted, plain]
            tokens_s = {engine: measure(engine, prompts, batch_size, sampling) for engine in order}
            # The first round warms up.
            if round_index >= 0:
                result.plain_tokens_s.append(tokens_s[plain])
                result.drafted_tokens_s.append(tokens_s[drafted])
                result.counters += ray.get(drafted.spec_counters.remote()) - before
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--draft", type=Path, help="a DFlash draft's directory; without it, the model's MTP head")
    parser.add_argument("--data", default=str(EXAMPLE / "data" / "validation.jsonl"), help="JSONL or parquet")
    parser.add_argument("--k", type=int, default=3, help="draft tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--max-prompt-length", type=int, default=64)
    parser.add_argument("--max-generate-length", type=int, default=96)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--num-threads", type=int, default=2, help="of an engine, on CPU")
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    with ray_session(verbose=False):
        results = run(args)
    print(f"| rollouts | tokens/s without | tokens/s with, k={args.k} | ratio (range) | mean acceptance length |")
    print("|---:|---:|---:|---:|---:|")
    for batch_size, result in results.items():
        print(result.row(batch_size))


if __name__ == "__main__":
    main()
