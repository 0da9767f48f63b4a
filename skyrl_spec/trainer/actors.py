"""Engines and workers as groups: who gets what, and how the answers come together again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from skyrl_spec.config import RunError, SamplingConfig
from skyrl_spec.data.packing import gather_shards
from skyrl_spec.types import Generation, Prompt, Proposals, ProposalScores, SpecCounters, StepReport, TrainBatch


class EngineGroup:
    """All rollout engines as one."""

    def __init__(self, handles: list[Any], timeout_s: float):
        self.handles = handles
        self._timeout_s = timeout_s

    def generate(self, prompts: list[Prompt], sampling: SamplingConfig, n: int, seed: int) -> list[list[Generation]]:
        """``n`` responses a prompt, prompts dealt out over the engines.

        Raises:
            RunError: no answer within ``generator.inference_engine.generate_timeout_s``.
        """
        stride = len(self.handles)
        refs = [
            engine.generate.remote(
                [prompt.token_ids for prompt in prompts[index::stride]], sampling, n, seed * stride + index
            )
            for index, engine in enumerate(self.handles)
            if prompts[index::stride]
        ]
        try:
            parts = ray.get(refs, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise RunError(
                f"generator.inference_engine.generate_timeout_s={self._timeout_s:g}: an engine did not answer in time; "
                "raise it or generate less a step"
            ) from None
        out: list[list[Generation]] = [[] for _ in prompts]
        for index, part in enumerate(parts):
            out[index::stride] = part
        return out

    def propose(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[list[Proposals]]:
        """What each engine answers to the same prompts, with what its draft proposed."""
        return ray.get([engine.propose.remote(prompts, sampling, seed) for engine in self.handles])

    def spec_counters(self) -> SpecCounters:
        """Speculation since the engines started, over all of them."""
        return sum(ray.get([engine.spec_counters.remote() for engine in self.handles]), SpecCounters())

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """Let engines free what they share with processes of their own; one that is busy too long just ends."""
        ray.wait(
            [engine.shutdown.remote() for engine in self.handles], num_returns=len(self.handles), timeout=timeout_s
        )
        for handle in self.handles:
            ray.kill(handle)


class PolicyGroup:
    """All policy workers as one. A batch is put into the object store once; every rank takes its shard from there."""

    def __init__(self, handles: list[Any], places: list[tuple[int, int]], gpus: PlacementGroup | None = None):
        self.handles = handles
        self._gpus = gpus
        # The tensor-parallel rank 0 of each data-parallel rank speaks for its replica.
        self._speakers = [places.index((dp_rank, 0)) for dp_rank in range(1 + max(dp for dp, _ in places))]

    def forward_logprobs(self, batch: TrainBatch) -> TrainBatch:
        """``batch`` with the policy's (and the reference's) log-probs before this batch's updates."""
        ref = ray.put(batch)
        answers = ray.get([worker.forward_logprobs.remote(ref) for worker in self.handles])
        return replace(batch, **gather_shards(batch, [answers[speaker] for speaker in self._speakers]))

    def train_mini_batch(self, batch: TrainBatch) -> StepReport:
        """One optimizer step; the metrics are of all ranks."""
        ref = ray.put(batch)
        return ray.get([worker.train_mini_batch.remote(ref) for worker in self.handles])[0]

    def train_draft(self, batch: TrainBatch) -> StepReport:
        """One optimizer step of the draft alone."""
        ref = ray.put(batch)
        return ray.get([worker.train_draft.remote(ref) for worker in self.handles])[0]

    def score_proposals(self, proposals: list[Proposals]) -> ProposalScores:
        """What policy and draft make of an engine's responses and drafted tokens."""
        ref = ray.put(proposals)
        return ray.get([worker.score_proposals.remote(ref) for worker in self.handles])[0]

    def save_checkpoint(self, directory: Path, extra: dict[str, Any]) -> None:
        """All ranks write ``directory`` together; it is there once it is complete."""
        ray.get([worker.save_checkpoint.remote(directory, extra) for worker in self.handles])

    def load_checkpoint(self, directory: Path) -> dict[str, Any]:
        """The driver's part of the checkpoint."""
        return ray.get([worker.load_checkpoint.remote(directory) for worker in self.handles])[0]

    def save_hf(self, run_dir: Path) -> None:
        """``run_dir/model``, and ``run_dir/draft`` where the draft has a directory of its own."""
        ray.get([worker.save_hf.remote(run_dir) for worker in self.handles])

    def save_draft_hf(self, run_dir: Path) -> None:
        """The draft alone, where ``save_hf`` would write it."""
        ray.get([worker.save_draft_hf.remote(run_dir) for worker in self.handles])

    def shutdown(self) -> None:
        """End the workers and give their GPUs back. What else runs on these GPUs ends too."""
        for handle in self.handles:
            ray.kill(handle)
        if self._gpus is not None:
            remove_placement_group(self._gpus)
