"""The training step.

    prompts -> engines -> scored groups (filtered, DAPO) -> advantages -> train batch
            -> log-probs before the update -> mini-batches: one optimizer step of policy and draft each
            -> sync: policy, then draft, one version -> canaries -> metrics

This file is the same for every draft, and without one: acceptance comes from the engines' counters, draft losses from
the workers' reports.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from skyrl_spec.algorithms.advantages import build_estimator, overlong_penalty
from skyrl_spec.algorithms.filters import Group
from skyrl_spec.controller.ahead import OneStepAhead
from skyrl_spec.controller.continuous import Continuous
from skyrl_spec.controller.draft_training import DraftTraining, Plan, build_draft_training
from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.fidelity import Watch, acceptance_gap, logprob_agreement, staleness
from skyrl_spec.controller.in_turns import InTurns
from skyrl_spec.controller.lossless import LosslessCanary
from skyrl_spec.controller.measures import positions_lacking, report_values, timed, train_timings
from skyrl_spec.controller.rollouts import RolloutSampler, SpeculationMeter
from skyrl_spec.controller.shifts import ScoringWorkers, Shifts
from skyrl_spec.controller.source import Sampled, Source
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.data.packing import build_train_batch, mini_batches
from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.metrics import names
from skyrl_spec.metrics.writers import write_evaluation
from skyrl_spec.settings.derived import coarser_dtype, longest_response, max_staleness, ratio_anchor
from skyrl_spec.settings.schema import Config
from skyrl_spec.sync.canary import SyncCanary
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.types import SERVED, DraftedResponse, Prompt, Rollout, TrainBatch, Versions

OnStep = Callable[[int, dict[str, float], Sequence[Rollout], Sequence[DraftedResponse]], None]
Shield = Callable[[], AbstractContextManager[None]]


class TrainingLoop:
    """The training loop. It owns the source of its batches, and ``close`` ends that. The caller ends the actors."""

    def __init__(
        self,
        config: Config,
        *,
        tokenizer: Any,
        stream: PromptStream,
        eval_prompts: list[Prompt],
        engines: EngineGroup,
        policy: PolicyGroup,
        sync: WeightSync,
        shifts: Shifts,
        canary: SyncCanary,
        lossless: LosslessCanary | None = None,
    ):
        self.config, self.stream, self.eval_prompts = config, stream, eval_prompts
        self.engines, self.policy, self.sync, self.shifts = engines, policy, sync, shifts
        self.scorers = ScoringWorkers(policy, shifts)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.sampler = RolloutSampler(config, engines, tokenizer)
        self.canary, self.lossless = canary, lossless
        self.draft_training = build_draft_training(config.trainer.draft.train, has_draft="draft" in sync.components)
        sampling = config.generator.sampling_params
        self._watch = Watch(
            config.trainer.canary,
            dtype=coarser_dtype(config),
            temperature=sampling.temperature,
            missing_positions=positions_lacking(config),
        )
        self._max_staleness = max_staleness(config)
        self._keeps_keys = self._max_staleness > 1 and config.trainer.fully_async.running_requests == "keep"
        self._is_stopping: Callable[[], bool] = lambda: False
        # In the last step: engines still sampled, because the run is told to stop.
        self._sync_left_out = False
        self.source = self._build_source()
        self.estimate_advantages = build_estimator(config.trainer.algorithm)

    def _build_source(self) -> Source:
        parts = self.config, self.sampler, self.engines, self.stream
        if self._max_staleness > 1:
            return Continuous(*parts)
        if self._max_staleness == 1:
            return OneStepAhead(*parts, lambda: self._is_stopping())
        return InTurns(*parts)

    def close(self) -> None:
        self.source.close()

    def run(
        self,
        num_steps: int,
        on_step: OnStep,
        *,
        steps_done: int = 0,
        shield: Shield = nullcontext,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Runs up to step ``num_steps``. Evaluates at the beginning, every ``eval_interval`` steps and at the end.

        Within ``shield`` a step must not be interrupted: weights have moved, and the step is not complete. Once
        ``is_stopping()``, the step does not wait for a batch that is sampled beside it, and leaves its sync out.
        """
        trainer, self._is_stopping = self.config.trainer, is_stopping
        self._calibrate()
        if trainer.canary.enabled:
            self.canary.check(self.sync.versions)
            self.canary.require_agreement()
        if trainer.eval_before_train and self.eval_prompts and steps_done == 0:
            on_step(0, self.evaluate(0), [], self.sampler.sample_with_drafts(self.eval_prompts))
        self.source.start(self.sync.versions, num_steps - steps_done)
        # Moves before the first step are not the step's.
        self.shifts.take_seconds()
        for step in range(steps_done + 1, num_steps + 1):
            if self.source.is_over:
                break
            sampled = self.sample()
            # Dynamic sampling takes more prompts than a batch has, so the epochs may be over early.
            is_last = step == num_steps or self.source.is_over
            with shield():
                values = self.train(sampled, is_last=is_last)
                drafted: list[DraftedResponse] = []
                due = trainer.eval_interval > 0 and (step % trainer.eval_interval == 0 or is_last)
                if due and self.eval_prompts and not self._sync_left_out:
                    with self.source.held():
                        values |= self.evaluate(step)
                        drafted = self.sampler.sample_with_drafts(self.eval_prompts)
                on_step(step, values, sampled.rollouts, drafted)
            self.canary.require_agreement()
            if is_last:
                break

    def state_dict(self, step: int) -> dict[str, Any]:
        """Driver's state after ``step``, as plain data for a checkpoint."""
        return {
            "step": step,
            **self.source.state_dict(),
            "versions": asdict(self.sync.versions),
            "canary": self.canary.state_dict(),
            "draft_training": self.draft_training.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``, and syncs the engines with the weights that the workers have loaded.

        The stream of prompts stays as it is: whoever made it has restored it (``task.load_task``).
        """
        with self.shifts.sync():
            self.sync.restore(Versions(**state["versions"]))
        self.source.load_state_dict(state)
        self.canary.load_state_dict(state["canary"])
        # A checkpoint of an earlier version has none.
        self.draft_training.load_state_dict(state.get("draft_training", {}))

    def sample(self) -> Sampled:
        """The first half of a step: its batch."""
        return self.source.take(self.sync.versions)

    def train(self, sampled: Sampled, *, is_last: bool = True) -> dict[str, float]:
        """The second half of a step: training, sync and canaries. Returns the metrics of the whole step.

        ``is_last``: no step follows.
        """
        start = time.perf_counter()
        values, timings = dict(sampled.values), dict(sampled.timings)
        if sampled.rollouts:
            stale_steps = staleness(sampled.rollouts, self.sync.versions, self._max_staleness)
            # The policy's version is the number of steps that trained.
            plan = self.draft_training.plan(self.sync.versions.policy)
            with self.shifts.workers(), self.source.beside(is_last=is_last):
                values |= self._train(self._build_batch(sampled.groups), timings, plan)
                sends_draft = plan.train and not self._is_undone(plan, values)
            self._sync_left_out = self.source.is_sampling
            with self.source.held(keeps_keys=self._keeps_keys):
                values |= self.source.draft_metrics()
                values |= acceptance_gap(values)
                values |= self._publish(plan, values, timings, sends_draft=sends_draft)
                if not self._sync_left_out and not self._keeps_keys:
                    values |= self._run_canaries(timings)
            if self._keeps_keys and self._is_canary_due:
                with self.source.held():
                    values |= self._run_canaries(timings)
            # Older weights explain differences between engines and trainer.
            if stale_steps == 0:
                self._watch.look(values)
        self.source.trained(self.sync.versions)
        values |= self._versions()
        if self.shifts.move:
            timings["moves"] = self.shifts.take_seconds()
        timings["step"] = sampled.seconds + time.perf_counter() - start
        if self._max_staleness and sampled.rollouts:
            values |= {names.STALENESS: stale_steps} | self.source.step_metrics(sampled, timings)
        return values | {names.timing(phase): seconds for phase, seconds in timings.items()}

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean reward on the held-out prompts, sampled with ``generator.eval_sampling_params``, after ``step``."""
        trainer, size = self.config.trainer, self.config.trainer.eval_batch_size
        speculation = SpeculationMeter(self.engines, "eval")
        rollouts = [
            rollout
            for start in range(0, len(self.eval_prompts), size)
            for group in self.sampler.sample_for_evaluation(self.eval_prompts[start : start + size])
            for rollout in group
        ]
        values = {names.EVAL_SCORE: float(np.mean([rollout.reward for rollout in rollouts]))} | speculation.metrics()
        if trainer.dump_eval_results:
            write_evaluation(Path(trainer.run_dir) / "dumped_evals" / f"step_{step}.jsonl", step, rollouts)
        return values

    def _calibrate(self) -> None:
        """Measures steps in engines that choose the lengths of their drafts. Prints how long it took."""
        if self.config.generator.speculation.schedule != "auto":
            return
        start, generator = time.perf_counter(), self.config.generator
        num_responses = self.config.trainer.train_batch_size * generator.n_samples_per_prompt
        largest = -(-num_responses // generator.inference_engine.num_engines)
        prompts = list(self.stream.prompts[: self.config.trainer.train_batch_size])
        if self.engines.calibrate(prompts, generator.sampling_params, largest):
            print(
                f"skyrl-spec: generator.speculation.schedule=auto: measured the engines' steps in "
                f"{time.perf_counter() - start:.0f} s",
                file=sys.stderr,
            )

    @property
    def _is_canary_due(self) -> bool:
        versions = self.sync.versions
        return self.canary.is_due(versions) or (self.lossless is not None and self.lossless.is_due(versions))

    def _run_canaries(self, timings: dict[str, float]) -> dict[str, float]:
        """Runs the canaries that are due at this version. Returns their metrics."""
        values: dict[str, float] = {}
        if self.canary.is_due(self.sync.versions):
            with timed(timings, "canary"):
                values |= self.canary.check(self.sync.versions)
        if self.lossless is not None and self.lossless.is_due(self.sync.versions):
            with timed(timings, "lossless"):
                values |= self.lossless.check(self.engines, seed=max(asdict(self.sync.versions).values()))
        return values

    def _is_undone(self, plan: Plan, values: dict[str, float]) -> bool:
        """Whether the training of the draft made it worse, and is undone."""
        is_worse = plan.train and self.draft_training.must_undo(values)
        if is_worse:
            self.policy.restore_draft(SERVED)
        return is_worse

    def _publish(
        self, plan: Plan, values: dict[str, float], timings: dict[str, float], *, sends_draft: bool
    ) -> dict[str, float]:
        """Brings what was trained to the engines. Returns metrics."""
        if self._sync_left_out:
            self.sync.skip(draft=sends_draft)
            return {}
        with self.shifts.sync(), timed(timings, "sync_weights"):
            num_bytes = self.sync.sync(draft=sends_draft, keeps_keys=self._keeps_keys)
        metrics: dict[str, float] = {names.SYNC_BYTES: num_bytes}
        if "draft" in self.sync.components:
            draft_sync_s = timings["sync_weights"] * self.sync.num_bytes.get("draft", 0) / num_bytes
            cost_s = timings.get("draft_train", 0.0) + draft_sync_s
            metrics |= self.draft_training.observe(plan, values, timings["generate"], cost_s)
            metrics[names.DRAFT_PUBLISHED] = float(sends_draft)
        return metrics

    def _train(self, batch: TrainBatch, timings: dict[str, float], plan: Plan) -> dict[str, float]:
        """Runs all optimizer steps on ``batch``, of the draft too. Adds the seconds of each phase to ``timings``."""
        trainer = self.config.trainer
        # In a single update, the policy is still the one whose log-probs are asked for.
        is_one_update = trainer.update_epochs_per_batch == 1 and len(batch) <= self._rows_per_mini_batch
        needs_old = ratio_anchor(self.config) == "old" and not is_one_update
        with timed(timings, "fwd_logprobs"):
            if trainer.algorithm.use_kl_loss or needs_old:
                batch = self.policy.forward_logprobs(batch, policy=needs_old)
        for copy in plan.kept:
            self.policy.keep_draft(copy)
        *first, last = self._mini_batches(batch, trainer.update_epochs_per_batch)
        reports = [self.policy.train_mini_batch(mini_batch, draft=plan.train) for mini_batch in first]
        reports.append(self.policy.train_mini_batch(last, draft=plan.train, scored=plan.scored))
        timings |= train_timings(reports)
        if not needs_old:
            # In the first update, the policy is still the one from before the step.
            batch = batch.select(slice(self._rows_per_mini_batch))
            batch = replace(batch, policy_logprobs=reports[0].policy_logprobs)
        return report_values(reports) | logprob_agreement(batch)

    def _build_batch(self, groups: Sequence[Group]) -> TrainBatch:
        algorithm, sampling = self.config.trainer.algorithm, self.config.generator.sampling_params
        rewards_PG = np.array([[rollout.reward for rollout in group] for group in groups])
        lengths_PG = np.array([[len(rollout.generation.token_ids) for rollout in group] for group in groups])
        num_trained_PG = np.array([[sum(rollout.loss_mask) for rollout in group] for group in groups])
        rewards_PG = rewards_PG + overlong_penalty(
            lengths_PG, sampling.max_generate_length, algorithm.overlong.buffer_len, algorithm.overlong.penalty_factor
        )
        return build_train_batch(
            [rollout for group in groups for rollout in group],
            self.estimate_advantages(rewards_PG, num_trained_PG).reshape(-1),
            pad_token_id=self.pad_token_id,
            loss_reduction=algorithm.loss_reduction,
            max_response_length=longest_response(self.config),
        )

    def _mini_batches(self, batch: TrainBatch, num_epochs: int) -> Iterator[TrainBatch]:
        for _ in range(num_epochs):
            yield from mini_batches(
                batch,
                self._rows_per_mini_batch,
                loss_reduction=self.config.trainer.algorithm.loss_reduction,
                max_response_length=longest_response(self.config),
            )

    @property
    def _rows_per_mini_batch(self) -> int:
        return self.config.trainer.policy_mini_batch_size * self.config.generator.n_samples_per_prompt

    def _versions(self) -> dict[str, float]:
        versions = self.sync.versions
        metrics: dict[str, float] = {names.POLICY_VERSION: versions.policy}
        return metrics | ({names.DRAFT_VERSION: versions.draft} if "draft" in self.sync.components else {})


class DraftWarmup(TrainingLoop):
    """Training loop with a frozen policy. Only the draft is trained and synced, in every step."""

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.draft_training = DraftTraining(1)

    def _train(self, batch: TrainBatch, timings: dict[str, float], plan: Plan) -> dict[str, float]:
        num_epochs = self.config.trainer.update_epochs_per_batch
        reports = [self.policy.train_draft(mini) for mini in self._mini_batches(batch, num_epochs)]
        timings["draft_train"] = sum(report.draft_train_s for report in reports)
        return report_values(reports)
