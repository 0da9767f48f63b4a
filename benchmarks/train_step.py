"""Benchmark of a training step on packs against padded rows and against a sequence a micro-batch.

    python benchmarks/train_step.py                      # the MTP example's model on a CPU, about ten minutes
    python benchmarks/train_step.py --draft dflash
    python benchmarks/train_step.py --medians 100 400 1600 --documents 12 --rounds 1

Lengths are log-normal (sigma 1), cut at the budget of 8,192 tokens. All alternatives need memory for that many tokens:

- packed: a pack holds up to 8,192 tokens.
- padded: rows, as many as the longest sequence allows, each padded to the longest of its micro-batch.
- one by one: a sequence a micro-batch, without padding.

They run in one process on the same trainer and documents, with and without a draft, and take turns. A run is forward
and backward pass of policy and draft, without the optimizer. Rates are medians and count no padding.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed import HashStore

from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.models import parallel
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.step import Micro, build_micro
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = {"mtp": EXAMPLES / "arithmetic_mtp" / "model", "dflash": EXAMPLES / "arithmetic_dflash" / "model"}
BUDGET = 8192
ALTERNATIVES = ("packed", "padded", "one by one")


class RowTrainer(PolicyTrainer):
    """Trainer whose micro-batches are ``num_rows`` consecutive rows. 0: packs."""

    num_rows = 0

    def _micros(self, batch: TrainBatch, rows: np.ndarray) -> list[Micro]:
        if not self.num_rows:
            return super()._micros(batch, rows)
        return [build_micro(batch, rows[first : first + self.num_rows]) for first in range(0, len(rows), self.num_rows)]


def build_trainer(draft: str, ranks: parallel.Parallel, *, with_draft: bool) -> RowTrainer:
    """Trainer of the example's model, with the settings of its experiment that matter here."""
    config, path = Config(), MODELS[draft]
    trainer = config.trainer
    trainer.policy.model.path = str(path)
    trainer.placement.device = "cpu"
    trainer.policy.megatron_config.dtype = "fp32"
    trainer.max_tokens_per_microbatch = BUDGET
    trainer.mtp.enabled, trainer.dflash.enabled = (with_draft and draft == name for name in ("mtp", "dflash"))
    trainer.dflash.path, trainer.dflash.anchors_per_sequence = str(path.with_name("draft")), 24
    return RowTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=1000)


def make_batch(lengths_B: np.ndarray, vocab_size: int) -> TrainBatch:
    """Random documents, a quarter of each its prompt."""
    rng, positions_S = np.random.default_rng(0), np.arange(lengths_B.max())
    is_token_BS = positions_S < lengths_B[:, None]
    loss_mask_BS = is_token_BS & (positions_S >= (lengths_B // 4 + 1)[:, None])
    logprobs_BS = np.where(loss_mask_BS, -1.0, 0.0).astype(np.float32)
    return TrainBatch(
        token_ids=np.where(is_token_BS, rng.integers(0, vocab_size, is_token_BS.shape), 0),
        lengths=lengths_B,
        loss_mask=loss_mask_BS,
        loss_weights=token_weights(loss_mask_BS, "token_mean", BUDGET),
        advantages=np.where(loss_mask_BS, rng.standard_normal((len(lengths_B), 1)), 0.0).astype(np.float32),
        rollout_logprobs=logprobs_BS,
        policy_logprobs=logprobs_BS,
    )


def padded(batch: TrainBatch, num_rows: int) -> TrainBatch:
    """``batch`` with each row as long as the longest of its ``num_rows`` neighbours. Padding has no loss."""
    groups = [batch.lengths[first : first + num_rows] for first in range(0, len(batch), num_rows)]
    return replace(batch, lengths=np.concatenate([np.full(len(group), group.max()) for group in groups]))


def measure(trainer: RowTrainer, batch: TrainBatch, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds and number of micro-batches of each alternative, which take turns. The first does not count."""
    num_rows = {"packed": 0, "padded": BUDGET // batch.lengths.max(), "one by one": 1}
    batches = {name: padded(batch, num_rows[name]) if name == "padded" else batch for name in ALTERNATIVES}
    times: dict[str, list[float]] = {name: [] for name in ALTERNATIVES}
    counts = {}
    for _ in range(rounds + 1):
        for name in ALTERNATIVES:
            trainer.num_rows = num_rows[name]
            counts[name] = len(trainer._micros(batches[name], trainer._local_rows(batches[name])))
            start = time.perf_counter()
            trainer.forward_backward(batches[name])
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(some[1:]) for name, some in times.items()}, counts


def compare(trainer: RowTrainer, draft: str, median: int, num_documents: int, rounds: int) -> str:
    """A row of the table."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), 1.0, num_documents).astype(int).clip(2, BUDGET)
    seconds, counts = measure(trainer, make_batch(lengths, trainer.spec.vocab_size), rounds)
    rates = {name: lengths.sum() / s for name, s in seconds.items()}
    cells = [draft, f"{median}", f"{lengths.sum()}", " / ".join(str(count) for count in counts.values())]
    cells += [f"{rate:.0f}" for rate in rates.values()]
    cells += [f"{rates['packed'] / rates[name]:.2f}" for name in ALTERNATIVES[1:]]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", choices=list(MODELS), default="mtp")
    parser.add_argument("--medians", type=int, nargs="+", default=[400])
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    ranks = parallel.initialize(
        rank=0, world_size=1, tensor_parallel_size=1, device=torch.device("cpu"), store=HashStore(), timeout_s=60.0
    )
    heads = ["draft", "median length", "tokens", f"micro-batches: {' / '.join(ALTERNATIVES)}"]
    heads += [f"{name} tokens/s" for name in ALTERNATIVES] + [f"packed / {name}" for name in ALTERNATIVES[1:]]
    print(f"| {' | '.join(heads)} |\n|{'---:|' * len(heads)}")
    for with_draft in (False, True):
        trainer = build_trainer(args.draft, ranks, with_draft=with_draft)
        for median in args.medians:
            name = args.draft if with_draft else "none"
            print(compare(trainer, name, median, args.documents, args.rounds), flush=True)


if __name__ == "__main__":
    main()
