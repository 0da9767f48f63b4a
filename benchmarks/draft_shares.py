"""Benchmark of the share of positions that a draft needs: several drafts side by side in one run.

    python benchmarks/draft_shares.py cpu_mtp_grpo                 # three seeds; one took 18 minutes on two busy cores
    python benchmarks/draft_shares.py cpu_dflash_grpo --seeds 0

The run is an experiment with twice its learning rate of the policy, so that the policy moves. Its worker has further
drafts, the arms. They train on the hidden states of the same mini-batches, each on its own share of the positions, and
never meet an engine. In the second half of the steps each is scored on every position of a mini-batch before it trains
on it. The table has the predicted acceptance length, relative to the arm that trains on all positions.

An arm is a share, drawn at random, such as 0.1. ``0.1:surprising`` takes the responses whose tokens had the lowest mean
log-prob in the rollout. ``0.1:windows8`` draws an MTP head's chains in windows of at least 8. ``0.1:lr2`` has twice the
draft's learning rate. ``frozen`` does not train.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from skyrl_spec.controller import placement
from skyrl_spec.controller.run import run_training
from skyrl_spec.drafts import shares
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.schema import Config
from skyrl_spec.training.worker import PolicyWorker
from skyrl_spec.types import Metric, Metrics, StepReport, TrainBatch

ALL = "1.0"
ARMS = {
    "mtp": [ALL, "0.2", "0.1", "0.05", "0.2:surprising", "frozen"],
    "dflash": [ALL, "0.3", "0.2", "0.1", "0.3:surprising", "frozen"],
}
PREFIX = "draft/arm/"


@dataclass
class Arm:
    """A draft that trains beside the run's own."""

    name: str
    draft: Any

    @property
    def share(self) -> float:
        """Share of the positions. 0: it does not train."""
        return 0.0 if self.name == "frozen" else float(self.name.partition(":")[0])

    @property
    def takes_surprising(self) -> bool:
        return self.name.endswith(":surprising")

    @property
    def smallest_window(self) -> int:
        """Chains of an MTP head's shortest window."""
        _, _, number = self.name.partition(":windows")
        return int(number) if number else shares.SMALLEST_WINDOW

    @contextmanager
    def drawing(self, share: float) -> Iterator[None]:
        """Context in which ``begin_step`` draws this share."""
        draft = self.draft.draft
        own, window = draft.config, shares.SMALLEST_WINDOW
        draft.config, shares.SMALLEST_WINDOW = replace(own, positions_per_step=share), self.smallest_window
        try:
            yield
        finally:
            draft.config, shares.SMALLEST_WINDOW = own, window


def surprising_rows(batch: TrainBatch, share: float) -> np.ndarray:
    """Loss mask ``[B, S]`` of the responses with the lowest mean log-prob, which have ``share`` of the tokens."""
    num_B = batch.loss_mask.sum(axis=1)
    mean_B = np.where(batch.loss_mask, batch.rollout_logprobs, 0.0).sum(axis=1) / np.maximum(num_B, 1)
    order = np.argsort(np.where(num_B > 0, mean_B, np.inf))
    chosen = order[np.cumsum(num_B[order]) <= share * num_B.sum()]
    is_chosen_B = np.isin(np.arange(len(num_B)), chosen if len(chosen) else order[:1])
    return batch.loss_mask & is_chosen_B[:, None]


def with_rate(config: Config, arm: str) -> Config:
    """``config`` with the learning rate of this arm's draft."""
    _, _, factor = arm.partition(":lr")
    if not factor:
        return config
    config, kind = copy.deepcopy(config), trained_kind(config.trainer)
    assert kind is not None
    kind.settings(config.trainer).optimizer_config.lr *= float(factor)
    return config


def make_arms_trainer(names: list[str], first_scored: int) -> type:
    """A trainer with these arms, which are scored from update number ``first_scored`` on."""
    from skyrl_spec.models.capture import capture
    from skyrl_spec.models.upload import upload
    from skyrl_spec.training.draft import load_draft
    from skyrl_spec.training.trainer import PolicyTrainer

    class ArmsTrainer(PolicyTrainer):
        def __init__(self, config: Config, spec: Any, parallel: Any, total_optimizer_steps: int, **options: Any):
            super().__init__(config, spec, parallel, total_optimizer_steps, **options)
            assert parallel.tp_size * parallel.dp_size == 1, "the arms are trained on one rank"
            configs = (with_rate(config, name) for name in names)
            loaded = (load_draft(own, spec, self._trunk_config, parallel, total_optimizer_steps) for own in configs)
            self._arms = [Arm(name, draft) for name, draft in zip(names, loaded, strict=True)]
            self._num_updates = 0

        def train_mini_batch(self, batch: TrainBatch, **options: Any) -> StepReport:
            metrics = self._train_arms(batch, is_scored=self._num_updates >= first_scored)
            self._num_updates += 1
            report = super().train_mini_batch(batch, **options)
            report.metrics |= metrics
            return report

        def _train_arms(self, batch: TrainBatch, *, is_scored: bool) -> Metrics:
            micros = self._micros(batch, self._local_rows(batch))
            sums = {arm.name: np.zeros(2) for arm in self._arms}
            scored = [self._supervised(arm, batch, micros, 1.0) if is_scored else None for arm in self._arms]
            trained = [self._supervised(arm, batch, micros, arm.share) if arm.share else None for arm in self._arms]
            for arm in self._arms:
                arm.draft.trainable.zero_grad()
            with capture(self.model, self._arms[0].draft.draft.capture_points) as captured:
                for index, micro in enumerate(micros):
                    pack = upload(micro.pack, self.parallel.device)
                    with torch.no_grad(), captured.listening():
                        teacher = self._teacher(self.model(pack))
                    held = captured.take(), teacher, pack
                    for arm, score, train in zip(self._arms, scored, trained, strict=True):
                        if score is not None:
                            sums[arm.name] += self._score(arm, held, score[index])
                        if train is not None:
                            self._backward(
                                arm, held, train[index], sum(part.weight for parts in train for part in parts)
                            )
            for arm in self._arms:
                if arm.share:
                    arm.draft.trainable.reduce_grads()
                    arm.draft.trainable.step()
            lengths = {name: Metric(accepted + chains, chains) for name, (accepted, chains) in sums.items()}
            return {f"{PREFIX}{name}": length for name, length in lengths.items()} if is_scored else {}

        def _supervised(self, arm: Arm, batch: TrainBatch, micros: list[Any], share: float) -> list[Any]:
            draft = arm.draft.draft
            picks = arm.takes_surprising and share < 1
            with arm.drawing(1.0 if picks else share):
                draft.begin_step(surprising_rows(batch, share) if picks else batch.loss_mask)
                return [draft.supervise(micro.pack, micro.rows) if micro.rows else () for micro in micros]

        @torch.no_grad()
        def _score(self, arm: Arm, held: tuple[Any, ...], parts: tuple[Any, ...]) -> np.ndarray:
            one, found = torch.ones((), dtype=torch.float64), np.zeros(2)
            for part in parts:
                _, sums = arm.draft.draft.loss(*held, upload(part, self.parallel.device), one)
                found += [float(sums.accepted_K.sum()), float(sums.num_chains)]
            return found

        def _backward(self, arm: Arm, held: tuple[Any, ...], parts: tuple[Any, ...], weight: float) -> None:
            total = torch.tensor(weight, dtype=torch.float64)
            for part in parts:
                loss, _ = arm.draft.draft.loss(*held, upload(part, self.parallel.device), total)
                loss.backward()

    return ArmsTrainer


class _ArmsWorker(PolicyWorker.__ray_metadata__.modified_class):  # type: ignore[name-defined]
    """A worker whose trainer has arms."""

    def start(self, *args: Any) -> None:
        from skyrl_spec.training import trainer

        names, first = self._config.trainer.tags[:-1], int(self._config.trainer.tags[-1])
        trainer.PolicyTrainer = make_arms_trainer(names, first)  # type: ignore[misc]
        super().start(*args)


def run(experiment: str, names: list[str], seed: int, folder: Path, more: list[str]) -> dict[str, float]:
    """Predicted acceptance length of each arm, over the second half of the steps."""
    run_dir = folder / f"{experiment}_{seed}"
    lr = load_config([f"experiment={experiment}"]).trainer.policy.optimizer_config.lr
    words = [
        f"experiment={experiment}", f"trainer.run_dir={run_dir}", f"trainer.seed={seed}", "trainer.eval_interval=0",
        "trainer.eval_before_train=false", "trainer.measure_speedup=false", "trainer.ckpt_interval=0",
        "trainer.logger=[]",
        f"trainer.policy.optimizer_config.lr={2 * lr}", "generator.speculation.schedule=fixed",
        "trainer.draft.train=every_step", "trainer.resume_mode=null", *more,
    ]  # fmt: skip
    config = load_config(words)
    updates = config.trainer.train_batch_size // config.trainer.policy_mini_batch_size
    assert config.trainer.max_training_steps is not None
    # The worker's settings are all that reaches it.
    tags = [*names, str(config.trainer.max_training_steps * updates // 2)]
    before, placement.PolicyWorker = placement.PolicyWorker, ray.remote(_ArmsWorker)  # type: ignore[misc,assignment]
    try:
        assert run_training(load_config([*words, f"trainer.tags={json.dumps(tags)}"])) == 0
    finally:
        placement.PolicyWorker = before  # type: ignore[misc]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {name: statistics.mean(row[PREFIX + name] for row in rows if PREFIX + name in row) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["cpu_mtp_grpo", "cpu_dflash_grpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="default: those of the table in docs/benchmarks.md")
    parser.add_argument("--out", type=Path, default=Path("runs/draft_shares"))
    parser.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    kind = trained_kind(load_config([f"experiment={args.experiment}"]).trainer)
    assert kind is not None
    names = args.arms or ARMS[kind.method]
    assert ALL in names, f"--arms must have {ALL}"
    lengths = []
    for seed in args.seeds:
        lengths.append(run(args.experiment, names, seed, args.out, args.settings))
        print(json.dumps({"seed": seed} | lengths[-1]), flush=True)
    print(f"\n| trained on | {' | '.join(f'seed {seed}' for seed in args.seeds)} | mean |")
    print(f"|---|{'---:|' * (len(args.seeds) + 1)}")
    print(f"| all positions | {' | '.join(f'{one[ALL]:.3f}' for one in lengths)} | |")
    for name in names:
        if name != ALL:
            changes = [100 * (one[name] / one[ALL] - 1) for one in lengths]
            cells = [f"{change:+.1f} %" for change in [*changes, statistics.mean(changes)]]
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
