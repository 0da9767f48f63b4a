"""Gradient buffer, optimizer, clipping and learning-rate schedule of one module.

Policy and draft are one ``Trainable`` each. They share no parameter, no buffer and no norm, so the draft cannot change
a bit of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from skyrl_spec.checkpoint.optimizer_state import optimizers
from skyrl_spec.errors import RunError
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.settings.draft import OptimizerConfig
from skyrl_spec.settings.policy import MegatronConfig
from skyrl_spec.training.host_copies import HostCopies
from skyrl_spec.types import Metric, Metrics


@dataclass(frozen=True)
class OptimizerStep:
    """Result of one optimizer step."""

    # Before clipping.
    grad_norm: float
    lr: float
    # The gradient was not finite, and nothing was updated.
    is_skipped: bool

    def metrics(self, prefix: str) -> Metrics:
        """Metrics under ``prefix``. A skipped update does not count in the mean gradient norm."""
        norm = Metric() if self.is_skipped else Metric(self.grad_norm, 1)
        return {
            f"{prefix}/grad_norm": norm,
            f"{prefix}/lr": Metric(self.lr, 1),
            f"{prefix}/skipped_updates": Metric(float(self.is_skipped), 1),
        }


class Trainable:
    """DDP, optimizer and schedule around ``module``."""

    def __init__(
        self,
        module: MegatronModule,
        config: TransformerConfig,
        optimizer: OptimizerConfig,
        megatron: MegatronConfig,
        parallel: Parallel,
        total_steps: int,
        max_skipped_updates: int,
        *,
        is_on_one_stage: bool = False,
    ):
        """``is_on_one_stage``: other pipeline stages have no part of the module."""
        self.parallel, self._is_on_one_stage = parallel, is_on_one_stage
        self._max_skipped, self._skipped_in_a_row = max_skipped_updates, 0
        self.module = module
        with megatron_patches.megatron_device(parallel.device):
            self.ddp = DistributedDataParallel(
                config=config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=megatron.use_distributed_optimizer,
                    overlap_grad_reduce=False,
                ),
                module=module,
            )
            with megatron_patches.groups_of_this_rank() if is_on_one_stage else nullcontext():
                self.optimizer: MegatronOptimizer = get_megatron_optimizer(
                    _megatron_optimizer_config(optimizer, megatron, config.params_dtype), [self.ddp]
                )
        if is_on_one_stage and parallel.stage_group is not None:
            # Megatron would sum the norm over all stages.
            is_sharded = megatron.use_distributed_optimizer
            for one in optimizers(self):
                one.grad_stats_parallel_group = parallel.stage_group if is_sharded else parallel.tp_group
        self.scheduler = _scheduler(self.optimizer, optimizer, total_steps)
        self.state = HostCopies(self._state_tensors, parallel.device)

    def zero_grad(self) -> None:
        """Clears the gradients. Call it before the first micro-batch of a mini-batch."""
        for buffer in self._grad_buffers:
            buffer.reload_from_cpu(move_params=False)
        self.state.reload()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_grads(self) -> None:
        """Sums gradients over data-parallel ranks. Every rank must call it, with or without tokens."""
        with megatron_patches.megatron_device(self.parallel.device):
            has_others = self._is_on_one_stage and self.parallel.pp_size > 1
            groups = _groups_of_stage(self.parallel) if has_others else None
            finalize_model_grads([self.ddp], num_tokens=None, pg_collection=groups)

    def step(self) -> OptimizerStep:
        """Clips the gradient, updates the module and advances the schedule, unless the gradient is not finite.

        Megatron's own ``step`` updates even then, because no gradient scaler is in use. This method therefore calls its
        two parts. All ranks see the same norm.

        Raises:
            RunError: too many updates in a row were skipped.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        self.state.require()
        with megatron_patches.megatron_device(self.parallel.device):
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            is_skipped = not math.isfinite(grad_norm)
            if not is_skipped:
                self._clip(grad_norm)
                self.optimizer.step_with_ready_grads()
                self.scheduler.step(increment=1)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        if self._skipped_in_a_row > self._max_skipped:
            raise RunError(
                f"trainer.max_skipped_updates={self._max_skipped}: {self._skipped_in_a_row} updates in a row were "
                f"skipped because the gradient norm of {type(self.module).__name__} is not finite ({grad_norm}); "
                "lower the learning rate, or look for bad data in samples.jsonl"
            )
        return OptimizerStep(grad_norm, lr, is_skipped)

    def offload(self) -> None:
        """Moves the optimizer's state to host memory, and frees the gradients. Both are back in the next step."""
        self.state.offload()
        for buffer in self._grad_buffers:
            buffer.offload_to_cpu(move_params=False)

    def take_over_weights(self) -> None:
        """Makes the module's weights, set from outside, those that the optimizer goes on from. Moments stay."""
        self.state.require()
        self.optimizer.reload_model_params()

    @property
    def _grad_buffers(self) -> list[Any]:
        return self.ddp.buffers + self.ddp.expert_parallel_buffers

    def _state_tensors(self) -> Iterator[Tensor]:
        """Moments, and main parameters that are not the module's own."""
        own = {parameter.untyped_storage()._cdata for parameter in self.module.parameters()}
        for optimizer in optimizers(self):
            inner = optimizer.optimizer
            for group in inner.param_groups:
                yield from (main for main in group["params"] if main.untyped_storage()._cdata not in own)
            for state in inner.state.values():
                # Counts of steps have one element, and may be in host memory.
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)

    def _clip(self, grad_norm: float) -> None:
        is_chained = isinstance(self.optimizer, ChainedOptimizer)
        for optimizer in self.optimizer.chained_optimizers if is_chained else [self.optimizer]:
            if parameters := optimizer.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, grad_norm)


def _groups_of_stage(parallel: Parallel) -> ProcessGroupCollection:
    """Groups for Megatron's sums of gradients of a module that no other stage has a part of."""
    groups = ProcessGroupCollection()
    groups.tp, groups.pp, groups.dp_cp = parallel.tp_group, parallel.pp_group, parallel.dp_cp_group
    # Megatron takes None for its own group of all stages.
    groups.embd = groups.pos_embd = parallel.alone_group
    return groups


def _megatron_optimizer_config(
    optimizer: OptimizerConfig, megatron: MegatronConfig, params_dtype: torch.dtype
) -> MegatronOptimizerConfig:
    beta1, beta2 = optimizer.adam_betas
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.max_grad_norm,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
    )


def _scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        # Not 0, so that the first update has an effect.
        init_lr=config.lr / (config.num_warmup_steps + 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.num_warmup_steps,
        # Megatron asserts that decay ends after warm-up.
        lr_decay_steps=max(total_steps, config.num_warmup_steps + 1),
        lr_decay_style=config.scheduler,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
