"""Benchmark of a training step on packs against a sequence a micro-batch, with and without a draft.

    python benchmarks/train_step.py                      # the MTP example's model on a CPU, about five minutes
    python benchmarks/train_step.py --draft dflash
    python benchmarks/train_step.py --medians 100 400 1600 --rounds 1

Lengths are log-normal (sigma 1), cut at the budget of 8,192 tokens. Both alternatives need memory for that many tokens:
a pack holds up to 8,192, and rows must fit if all are as long as the longest, so there is one row at a time. They run
in one process on the same trainer and documents, and take turns. A run is forward and backward pass of policy and
draft, without the optimizer. The table has medians.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.distributed import HashStore

from skyrl_spec.data.packing import pack_rows
from skyrl_spec.losses.reduce import token_weights
from skyrl_spec.models import parallel
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = {"mtp": EXAMPLES / "arithmetic_mtp" / "model", "dflash": EXAMPLES / "arithmetic_dflash" / "model"}
# Budgets that make packs, and that leave every sequence alone.
BUDGET = 8192
BUDGETS = {"packed": BUDGET, "one by one": 1}


def build_trainer(draft: str, ranks: parallel.Parallel, *, with_draft: bool) -> PolicyTrainer:
    """Trainer of the example's model, with the settings of its experiment that matter here."""
    config, path = Config(), MODELS[draft]
    trainer = config.trainer
    trainer.policy.model.path = str(path)
    trainer.placement.device = "cpu"
    trainer.policy.megatron_config.dtype = "fp32"
    trainer.max_tokens_per_microbatch = BUDGET
    trainer.mtp.enabled, trainer.dflash.enabled = (with_draft and draft == name for name in ("mtp", "dflash"))
    trainer.dflash.path, trainer.dflash.anchors_per_sequence = str(path.with_name("draft")), 24
    return PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=1000)


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


def measure(trainer: PolicyTrainer, batch: TrainBatch, rounds: int) -> dict[str, float]:
    """Median seconds of each alternative, which take turns. The first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in BUDGETS}
    for _ in range(rounds + 1):
        for name, budget in BUDGETS.items():
            trainer.config.trainer.max_tokens_per_microbatch = budget
            start = time.perf_counter()
            trainer.forward_backward(batch)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(some[1:]) for name, some in times.items()}


def compare(trainer: PolicyTrainer, draft: str, median: int, num_documents: int, rounds: int) -> str:
    """A row of the table."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), 1.0, num_documents).astype(int).clip(2, BUDGET)
    seconds = measure(trainer, make_batch(lengths, trainer.spec.vocab_size), rounds)
    num_packs = len(pack_rows(lengths, BUDGET))
    rates = {name: lengths.sum() / s for name, s in seconds.items()}
    cells = [draft, f"{median}", f"{lengths.sum()}", f"{num_packs} / {num_documents}"]
    cells += [f"{rate:.0f}" for rate in rates.values()] + [f"{rates['packed'] / rates['one by one']:.2f}"]
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
    heads = ["draft", "median length", "tokens", "micro-batches: packed / one by one", "packed tokens/s"]
    heads += ["one by one tokens/s", "packed / one by one"]
    print(f"| {' | '.join(heads)} |\n|{'---:|' * len(heads)}")
    for with_draft in (False, True):
        trainer = build_trainer(args.draft, ranks, with_draft=with_draft)
        for median in args.medians:
            name = args.draft if with_draft else "none"
            print(compare(trainer, name, median, args.documents, args.rounds), flush=True)


if __name__ == "__main__":
    main()
