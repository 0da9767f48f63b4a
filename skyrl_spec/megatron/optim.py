"""A module with a gradient buffer, an optimizer, a clip and a learning-rate schedule of its own.

Policy and draft each are one ``Trainable``. They share no parameter, no buffer and no norm, so nothing about the
draft can change a bit of the policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_spec.config import MegatronConfig, OptimizerConfig, RunError
from skyrl_spec.megatron import compat
from skyrl_spec.megatron.parallel import Parallel


@dataclass(frozen=True)
class OptimizerStep:
    grad_norm: float
    lr: float


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
    ):
        self.parallel = parallel
        self.module = module
        with compat.megatron_device(parallel.device):
            self.ddp = DistributedDataParallel(
                config=config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=megatron.use_distributed_optimizer,
                    overlap_grad_reduce=False,
                ),
                module=module,
            )
            self.optimizer: MegatronOptimizer = get_megatron_optimizer(
                _megatron_optimizer_config(optimizer, megatron, config.params_dtype), [self.ddp]
            )
        self.scheduler = _scheduler(self.optimizer, optimizer, total_steps)

    def zero_grad(self) -> None:
        """Before the first micro-batch of a mini-batch."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_grads(self) -> None:
        """Sum gradients over data parallelism; every rank must call it, with or without tokens of its own."""
        with compat.megatron_device(self.parallel.device):
            finalize_model_grads([self.ddp], num_tokens=None)

    def step(self) -> OptimizerStep:
        """Clip, update, move the schedule on.

        Raises:
            RunError: the gradient was not finite. All ranks see the same norm, so all of them raise.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        with compat.megatron_device(self.parallel.device):
            _, grad_norm, _ = self.optimizer.step()
        # Without a gradient scaler Megatron updates whatever the norm is, so nothing can go on from here.
        if not math.isfinite(grad_norm):
            raise RunError(
                f"the gradient norm of {type(self.module).__name__} is {grad_norm}; "
                "lower the learning rate, or look at samples.jsonl for what it was trained on"
            )
        self.scheduler.step(increment=1)
        return OptimizerStep(grad_norm=float(grad_norm), lr=lr)


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
        # Not 0: the first update counts.
        init_lr=config.lr / (config.num_warmup_steps + 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.num_warmup_steps,
        # The schedule asserts that decay ends after warm-up.
        lr_decay_steps=max(total_steps, config.num_warmup_steps + 1),
        lr_decay_style=config.scheduler,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
