"""Policy, draft and reference of one rank: log-probs, optimizer steps and export. ``worker`` is the Ray actor.

Megatron's schedule runs a mini-batch micro-batch by micro-batch:

1. The policy's forward pass runs. Hooks capture detached trunk states.
2. The draft's forward and backward pass run on these states.
3. The policy's backward pass runs.

Then gradients are summed over data-parallel ranks, and the policy's and the draft's optimizers step independently. With
a frozen policy (warm-up of a draft), only the draft is trained.

In a pipeline, a rank has the layers of one stage. The last stage has the draft and the losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_spec.checkpoint.pieces import SavedComponent
from skyrl_spec.data.packing import pack_rows, shard_rows
from skyrl_spec.drafts.base import Supervision, Teacher, draft_metrics, num_sums
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.losses.logprobs import TokenLogprobs
from skyrl_spec.models.context_parallel import ContextRanks
from skyrl_spec.models.conversion import HfTensors, load_weights, own_rules
from skyrl_spec.models.expert_load import ExpertLoad
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.models.policy import PolicyModel, build_policy, transformer_config
from skyrl_spec.models.upload import upload
from skyrl_spec.settings.derived import pack_tokens, ratio_anchor, uses_fp32_head, uses_tis
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import ModelSpec
from skyrl_spec.specs.stages import Stages
from skyrl_spec.training import pipeline
from skyrl_spec.training.copies import DraftCopies, Held, score_metrics
from skyrl_spec.training.device_clock import DeviceClock
from skyrl_spec.training.draft import load_draft
from skyrl_spec.training.draft_states import DraftStates
from skyrl_spec.training.exports import Exports
from skyrl_spec.training.offload import Offload
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.training.proposals import BlockPack, block_packs, response_batch, score_block
from skyrl_spec.training.step import POLICY_SUMS, Micro, build_micro, in_rows, policy_loss, response_logprobs
from skyrl_spec.types import Component, Metric, Metrics, Proposals, ProposalScores, StepReport, TrainBatch

# Name of the draft's number of steps in a checkpoint.
_STEPS = "steps"


@dataclass(frozen=True)
class Example:
    """A micro-batch, and the draft's supervision of it: a part for each pass of the draft, none if none is drawn."""

    micro: Micro
    supervisions: tuple[Supervision, ...]


def _size(example: Example) -> tuple[bool, int]:
    """Orders micro-batches alike on all ranks that share them: with supervision, then by response tokens."""
    return bool(example.supervisions), len(example.micro.loss_weights_N)


class PolicyTrainer:
    """Policy, draft and reference of one rank. Most methods are collective: all ranks call them together."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        parallel: Parallel,
        total_optimizer_steps: int,
        *,
        freeze_policy: bool = False,
    ):
        self.config, self.spec, self.parallel = config, spec, parallel
        megatron = config.trainer.policy.megatron_config
        self._draft_clock = DeviceClock(parallel.device)
        self._trunk_config = transformer_config(spec, megatron, parallel.device)
        self._context = ContextRanks.of(parallel, is_sequence_parallel=self._trunk_config.sequence_parallel)
        self._budget = pack_tokens(config)
        tensors, kind = HfTensors(spec.path), trained_kind(config.trainer)
        self._stages = Stages.of(spec.num_layers, megatron)
        self.exports = Exports(config, spec, parallel, self._stages, self._trunk_config.params_dtype)
        self.model = self._load_policy(tensors)
        if config.trainer.algorithm.router_replay:
            self.model.replay_routers()
        self._expert_load = None
        if spec.experts is not None:
            self._expert_load = ExpertLoad(self.model, spec.num_layers, spec.experts, parallel)
        # A frozen policy needs neither gradients nor optimizer state.
        self.policy = (
            None
            if freeze_policy
            else Trainable(
                self.model,
                self._trunk_config,
                config.trainer.policy.optimizer_config,
                megatron,
                parallel,
                total_optimizer_steps,
                config.trainer.max_skipped_updates,
            )
        )
        self.draft = load_draft(config, spec, self._trunk_config, parallel, total_optimizer_steps)
        # The draft in steps that train it, None in others and on other stages.
        self._trained_draft, self._trains_draft = self.draft, True
        self._draft_kind = kind
        # The micro-batch on which copies of the draft are scored, and what the draft reads of it.
        self._to_hold: Example | None = None
        self._held: Held | None = None
        self.reference = self._load_policy(tensors).eval() if config.trainer.algorithm.use_kl_loss else None
        trained_draft = None if self.draft is None else self.draft.trainable
        self.offload = Offload(config, self.model, self.policy, trained_draft, self.reference)
        self.offload.reference()
        self._draft_states = DraftStates(
            self.model,
            parallel,
            self._stages,
            None if kind is None else kind.captured_layers(config, spec),
            () if self.draft is None else self.draft.draft.capture_points,
            self.offload.require,
        )

    def forward_logprobs(self, batch: TrainBatch, *, policy: bool = True) -> dict[str, np.ndarray]:
        """Log-probs of this rank's shard of ``batch`` under the policy, and under the reference if one is loaded.

        Args:
            policy: False leaves out the policy.

        Returns:
            ``policy_logprobs`` and ``ref_logprobs``, ``[rows of the shard, S]`` float32, 0 outside the response. The
            shard is that of ``data.packing.shard_rows``. Zeros but on the last stage.
        """
        shards = self._shards(batch)
        logprobs = {"policy_logprobs": self._logprobs(self.model, batch, shards)} if policy else {}
        if self.reference is not None:
            logprobs["ref_logprobs"] = self._logprobs(self.reference, batch, shards)
            self.offload.reference()
        return logprobs

    def train_mini_batch(self, batch: TrainBatch, *, draft: bool = True, scored: tuple[str, ...] = ()) -> StepReport:
        """One optimizer step of policy and draft on this rank's shard of ``batch``.

        Args:
            draft: False leaves the draft alone.
            scored: copies of the draft (``draft_copies``) whose acceptance length is predicted, on one micro-batch.
        """
        start = time.perf_counter()
        self._trains_draft, self._trained_draft = draft, self.draft if draft else None
        self._draft_clock.reset()
        examples, denominator = self._examples(batch)
        self._to_hold = max(examples, key=_size) if scored and self._trained_draft is not None else None
        logprobs: list[Tensor] = []
        metrics = self._reduce(self._run(examples, denominator, logprobs))
        metrics |= {} if self._expert_load is None else self._expert_load.metrics()
        metrics |= self.optimizer_step(scored if draft else ())
        draft_s = self._draft_clock.seconds()
        report = StepReport(metrics, time.perf_counter() - start - draft_s, draft_s)
        if batch.policy_logprobs is None and logprobs:
            micros = [example.micro for example in examples]
            report.policy_logprobs = in_rows(batch, self._shards(batch)[self.parallel.dp_rank], micros, logprobs)
        return report

    @property
    def draft_copies(self) -> DraftCopies | None:
        """Copies of the draft's weights. None on other stages than the draft's."""
        self.offload.require(self.model)
        return None if self.draft is None else self.draft.copies

    def train_draft(self, batch: TrainBatch) -> StepReport:
        """One optimizer step of the draft on this rank's shard of ``batch``. The policy runs forward only."""
        start = time.perf_counter()
        examples, denominator = self._examples(batch)
        sums = self._zero_sums()
        if self.draft is not None:
            self.draft.trainable.zero_grad()
        with self._draft_states.read():

            def forward_step(data: Iterator[Example], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
                example = next(data)
                with torch.no_grad():
                    hidden_TD = self._draft_states.forward(model, example.micro.pack)
                if self.draft is not None:
                    sums.add_(self._train_draft(hidden_TD, example, denominator))
                return hidden_TD, pipeline.no_loss

            packs = [example.micro.pack for example in examples]
            pipeline.run(forward_step, self.model, examples, packs, self.parallel, forward_only=True)
        metrics: Metrics = {}
        if self.draft is not None:
            self.draft.trainable.reduce_grads()
            dist.all_reduce(sums, group=self.parallel.dp_cp_group)
            metrics = draft_metrics(sums.tolist()) | self.draft.trainable.step().metrics("draft")
        return StepReport(metrics=metrics, draft_train_s=time.perf_counter() - start)

    def forward_backward(self, batch: TrainBatch) -> Tensor:
        """Computes the gradients of ``batch``, summed over data- and context-parallel ranks, in both gradient buffers.

        Returns:
            This rank's sums for ``_reduce``, float64: the policy's, then the draft's.
        """
        return self._run(*self._examples(batch), [])

    def _run(self, examples: list[Example], denominator: Tensor, logprobs: list[Tensor]) -> Tensor:
        """``forward_backward`` of these micro-batches. Appends the log-probs of each to ``logprobs``."""
        assert self.policy is not None
        policy_sums = torch.zeros(len(POLICY_SUMS) + 1, dtype=torch.float64, device=self.parallel.device)
        draft_sums = self._zero_sums()
        self.policy.zero_grad()
        if self._trained_draft is not None:
            self._trained_draft.trainable.zero_grad()
        with self._draft_states.read(is_read=self._trains_draft):

            def forward_step(data: Iterator[Example], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
                example = next(data)
                hidden_TD = self._draft_states.forward(model, example.micro.pack)
                if self._trained_draft is not None:
                    with self._draft_clock:
                        draft_sums.add_(self._train_draft(hidden_TD, example, denominator))
                return hidden_TD, lambda hidden: self._policy_loss(hidden, example.micro, policy_sums, logprobs)

            packs = [example.micro.pack for example in examples]
            pipeline.run(forward_step, self.policy.ddp, examples, packs, self.parallel)
        self.policy.reduce_grads()
        if self._trained_draft is not None:
            with self._draft_clock:
                self._trained_draft.trainable.reduce_grads()
        return torch.cat([policy_sums, draft_sums])

    def optimizer_step(self, scored: tuple[str, ...] = ()) -> Metrics:
        """Updates draft and policy from their gradient buffers. Copies are scored before the policy moves."""
        assert self.policy is not None
        metrics: Metrics = {}
        if self._trained_draft is not None:
            with self._draft_clock:
                metrics |= self._trained_draft.trainable.step().metrics("draft")
                if scored:
                    metrics |= self._score_copies(scored)
        return metrics | self.policy.step().metrics("policy")

    @torch.no_grad()
    def score_proposals(self, proposals: Sequence[Proposals]) -> ProposalScores:
        """Scores of an engine's responses under the policy, and of its drafted tokens under the draft.

        Collective over the ranks of a replica, and those with its experts. All replicas compute the same.
        """
        batch, kind = response_batch(proposals), self._draft_kind
        all_rows = [np.arange(len(batch))] * self.parallel.dp_size
        policy_logprobs = self._logprobs(self.model, batch, all_rows)[batch.loss_mask]
        num_positions = 0 if kind is None else kind.num_positions(self.config, self.spec)
        scores = [(np.zeros((0, num_positions), np.float32), np.zeros((0, num_positions), np.int64))]
        if kind is not None:
            blocks = list(block_packs(proposals, num_positions, self._budget, self._context))
            scores += self._score_blocks(blocks) if blocks else []
        logprobs, favourites = (np.concatenate(arrays) for arrays in zip(*scores, strict=True))
        return ProposalScores(policy_logprobs, logprobs, favourites)

    def random_state(self) -> dict[str, Tensor]:
        """States of the generators that belong to this trainer."""
        return {} if self.draft is None else {_STEPS: torch.tensor(self.draft.draft.random.num_steps)}

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Restores a ``random_state``. A checkpoint made before drafts drew anything has none."""
        if self.draft is not None:
            self.draft.draft.random.num_steps = int(state.get(_STEPS, 0))

    def export(self, component: Component) -> Iterator[tuple[str, Tensor]]:
        """HF names and full tensors, as vLLM loads them. All ranks that ``exports.takes_part`` must iterate."""
        self.offload.require(self.model)
        if component == "policy":
            return self.exports.tensors(component, self.model)
        return self.exports.tensors(component, None if self.draft is None else self.draft.draft.module)

    def saved_components(self) -> dict[Component, SavedComponent]:
        """Trained components, for a checkpoint."""
        saved: dict[Component, SavedComponent] = {}
        if self.policy is not None:
            rules = own_rules(self.model, self.exports.rules["policy"])
            saved["policy"] = SavedComponent(self.policy, rules, self.offload.current)
        if self.draft is not None:
            saved["draft"] = SavedComponent(self.draft.trainable, self.draft.draft.rules, self.offload.current)
        return saved

    def _load_policy(self, tensors: HfTensors) -> PolicyModel:
        model = build_policy(self.spec, self._trunk_config, self.parallel, self._stages)
        load_weights(model, own_rules(model, self.exports.rules["policy"]), tensors, self.parallel)
        return model

    @torch.no_grad()
    def _logprobs(self, model: PolicyModel, batch: TrainBatch, shards: Sequence[np.ndarray]) -> np.ndarray:
        """Log-probs of the response tokens of this rank's rows, ``[rows, S]``, 0 elsewhere.

        Args:
            shards: rows of each data-parallel rank.
        """
        rows, micros, logprobs = shards[self.parallel.dp_rank], self._micros(batch, shards), list[Tensor]()

        def forward_step(data: Iterator[Micro], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro = upload(next(data), self.parallel.device)
            hidden_TD = self._draft_states.forward(stage, micro.pack, is_read=False)
            if self.parallel.is_last_stage:
                logprobs.append(self._token_logprobs(model, hidden_TD, micro).logprobs_T)
            return hidden_TD, pipeline.no_loss

        packs = [micro.pack for micro in micros]
        pipeline.run(forward_step, model, micros, packs, self.parallel, forward_only=True)
        if not logprobs:
            return np.zeros((len(rows), batch.token_ids.shape[1]), np.float32)
        return in_rows(batch, rows, micros, logprobs)

    def _token_logprobs(self, model: PolicyModel, hidden_TD: Tensor, micro: Micro) -> TokenLogprobs:
        return response_logprobs(
            hidden_TD,
            model.output_weight_vD(),
            micro,
            temperature=self.config.generator.sampling_params.temperature,
            **self._head,
        )

    @property
    def _head(self) -> dict[str, Any]:
        """Options of ``losses.logprobs``."""
        return {
            "vocab_size": self.spec.vocab_size,
            "chunk_size": self.config.trainer.logprobs_chunk_size,
            "group": self.parallel.tp_group,
            "fp32_logits": uses_fp32_head(self.config),
        }

    def _policy_loss(
        self, hidden_TD: Tensor, micro: Micro, sums: Tensor, logprobs: list[Tensor]
    ) -> tuple[Tensor, Tensor, None]:
        tokens = self._token_logprobs(self.model, hidden_TD, micro)
        logprobs.append(tokens.logprobs_T.detach())
        algorithm, anchor = self.config.trainer.algorithm, ratio_anchor(self.config)
        loss, micro_sums = policy_loss(tokens, micro, algorithm, anchor=anchor, has_tis=uses_tis(self.config))
        # Ranks that share a pack compute the same.
        if self.parallel.cp_rank == 0:
            sums[: len(micro_sums)] += micro_sums
        # With calculate_per_token_loss the schedule only adds up this number of tokens and does not divide the loss.
        return loss, torch.zeros((), dtype=torch.int, device=self.parallel.device), None

    def _shards(self, batch: TrainBatch) -> list[np.ndarray]:
        """Numbers of the rows of each data-parallel rank."""
        return shard_rows(batch.lengths, self.parallel.dp_size)

    def _micros(self, batch: TrainBatch, shards: Sequence[np.ndarray]) -> list[Micro]:
        """Packs of this rank's rows, on the CPU, and some without rows or a loss, for the collectives."""
        rows = shards[self.parallel.dp_rank]
        packs, num_packs = pack_rows(batch.lengths[rows], self._budget), 1
        if self.parallel.divides_experts:
            # Tokens of all replicas meet at the experts, pack by pack.
            num_packs = max(len(pack_rows(batch.lengths[shard], self._budget)) for shard in shards)
        packs += [np.zeros(0, np.int64)] * (max(num_packs, 1) - len(packs))
        return [build_micro(batch, rows[pack], self._context) for pack in packs]

    def _examples(self, batch: TrainBatch) -> tuple[list[Example], Tensor]:
        """This rank's micro-batches, uploaded, and the weight of the supervision of all ranks."""
        device, load_weight = self.parallel.device, self.config.trainer.policy.megatron_config.moe_aux_loss_coeff
        # Megatron takes it times the tokens of a pack, and leaves the division by those of all packs to others.
        self._trunk_config.moe_aux_loss_coeff = load_weight / int(batch.lengths.sum())
        micros = self._micros(batch, self._shards(batch))
        if self._trained_draft is None:
            return [upload(Example(micro, ()), device) for micro in micros], torch.zeros((), device=device)
        draft = self._trained_draft.draft
        with self._draft_clock:
            draft.begin_step(batch.loss_mask)
            # A micro-batch without rows is there for the policy's collectives.
            examples = [
                Example(micro, draft.supervise(micro.pack, micro.rows) if micro.rows else ()) for micro in micros
            ]
            weight = sum(part.weight for example in examples for part in example.supervisions)
            total = torch.tensor(weight, dtype=torch.float64, device=device)
            dist.all_reduce(total, group=self.parallel.dp_cp_group)
        return [upload(example, device) for example in examples], total

    def _train_draft(self, hidden_TD: Tensor, example: Example, denominator: Tensor) -> Tensor:
        """Runs the draft forward and backward on detached tensors; returns its sums (``DraftSums.flat``)."""
        assert self._trained_draft is not None
        states, teacher = self._draft_states.take(example.micro.pack), self._teacher(hidden_TD)
        total = self._zero_sums()
        if example is self._to_hold:
            self._held = Held(states, teacher, example.micro.pack, example.supervisions)
        for supervision in example.supervisions:
            loss, sums = self._trained_draft.draft.loss(states, teacher, example.micro.pack, supervision, denominator)
            loss.backward()
            total += sums.flat()
        return total

    @torch.no_grad()
    def _score_copies(self, scored: tuple[str, ...]) -> Metrics:
        """Predicted acceptance length of each copy on the micro-batch that is held, which is let go."""
        assert self.draft is not None
        assert self._held is not None
        sums = self.draft.copies.score(self.draft.draft, self._held, scored)
        self._held = self._to_hold = None
        dist.all_reduce(sums, group=self.parallel.dp_cp_group)
        return score_metrics(scored, sums.flatten().tolist())

    def _teacher(self, hidden_TD: Tensor) -> Teacher:
        return Teacher(hidden_TD.detach(), self.model.output_weight_vD().detach(), self.model.embed)

    def _score_blocks(self, blocks: Sequence[BlockPack]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each pack, the log-prob of every drafted token under this draft, and its most probable token, ``[A, K]``.

        Empty but on the last stage.
        """
        scores: list[tuple[np.ndarray, np.ndarray]] = []
        with self._draft_states.read():

            def forward_step(data: Iterator[BlockPack], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
                block = upload(next(data), self.parallel.device)
                hidden_TD = self._draft_states.forward(model, block.pack)
                if self.draft is not None:
                    states, teacher = self._draft_states.take(block.pack), self._teacher(hidden_TD)
                    scores.append(score_block(self.draft.draft, states, teacher, block, **self._head))
                return hidden_TD, pipeline.no_loss

            packs = [block.pack for block in blocks]
            pipeline.run(forward_step, self.model, blocks, packs, self.parallel, forward_only=True)
        return scores

    def _zero_sums(self) -> Tensor:
        width = 0 if self._trained_draft is None else num_sums(self._trained_draft.draft.num_positions)
        return torch.zeros(width, dtype=torch.float64, device=self.parallel.device)

    def _reduce(self, sums: Tensor) -> Metrics:
        """Metrics of all ranks, in one collective. Losses carry their denominator. Nothing but on the last stage."""
        if not self.parallel.is_last_stage:
            return {}
        dist.all_reduce(sums, group=self.parallel.dp_cp_group)
        values = sums.tolist()
        loss, *token_sums, num_tokens = values[: len(POLICY_SUMS) + 1]
        metrics = {"policy/policy_loss": Metric(loss, 1)}
        metrics |= {
            f"policy/{name}": Metric(total, num_tokens) for name, total in zip(POLICY_SUMS[1:], token_sums, strict=True)
        }
        if self._trained_draft is not None:
            metrics |= draft_metrics(values[len(POLICY_SUMS) + 1 :])
        if self.reference is None:
            del metrics["policy/kl"]
        return metrics
