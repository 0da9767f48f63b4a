"""Full gradients by HF name, from Megatron's buffers after the backward pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skyrl_spec.models import megatron_patches
from skyrl_spec.models.conversion import Rule, canonical_shard
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import Component


def hf_gradients(trainer: PolicyTrainer, component: Component) -> dict[str, Tensor]:
    """Gradient of every HF tensor of ``component`` that this pipeline stage has, summed over data-parallel ranks.

    Collective; equal on every rank of the stage. The buffers are only read: an optimizer step may follow.
    """
    saved = trainer.saved_components().get(component)
    if saved is None:
        return {}
    trainable, rules = saved.trainable, saved.rules
    parameters, gradients = megatron_patches.named_parameters(trainable.module), _local_gradients(trainable)
    found: dict[str, Tensor] = {}
    for rule in rules:
        full = _gather_tensor_parallel(gradients[parameters[rule.megatron]], rule, trainer.parallel)
        found |= zip(rule.hf, rule.from_canonical(full), strict=True)
    return found


def _local_gradients(trainable: Trainable) -> dict[nn.Parameter, Tensor]:
    """Gradient of each parameter on this tensor-parallel rank."""
    is_sharded = trainable.ddp.ddp_config.use_distributed_optimizer
    found = {}
    for buffer in trainable.ddp.buffers:
        flat = buffer.grad_data.clone()
        if is_sharded:
            for bucket in buffer.buckets:
                _gather_data_parallel(flat[bucket.offset :][: len(bucket.grad_data)], trainable.parallel)
        for parameter, (start, end, _) in buffer.param_index_map.items():
            found[parameter] = flat[start:end].view(parameter.shape)
    return found


def _gather_data_parallel(bucket: Tensor, parallel: Parallel) -> None:
    """Fills ``bucket``: each rank of the distributed optimizer has the sum of its own equal part only."""
    parts = bucket.chunk(dist.get_world_size(parallel.dp_cp_group))
    gathered = [torch.empty_like(part) for part in parts]
    dist.all_gather(gathered, parts[parallel.replica].clone(), group=parallel.dp_cp_group)
    bucket.copy_(torch.cat(gathered))


def _gather_tensor_parallel(gradient: Tensor, rule: Rule, parallel: Parallel) -> Tensor:
    """Full gradient in the canonical layout. For a replicated parameter, this rank's gradient."""
    shard = canonical_shard(gradient, rule).contiguous()
    if rule.shard_axis is None:
        return shard
    shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, shard, group=parallel.tp_group)
    return torch.cat(shards, dim=rule.shard_axis)
