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
        full = _gather_cut(gradients[parameters[rule.megatron]], rule, trainer.parallel)
        found |= zip(rule.hf, rule.from_canonical(full), strict=True)
    return found


def _local_gradients(trainable: Trainable) -> dict[nn.Parameter, Tensor]:
    """Gradient of each parameter on this tensor-parallel rank."""
    is_sharded = trainable.ddp.ddp_config.use_distributed_optimizer
    found = {}
    groups = ((trainable.ddp.buffers, trainable.parallel.dp_cp_group),)
    groups += ((trainable.ddp.expert_parallel_buffers, trainable.parallel.expert_dp_group),)
    for buffer, group in ((buffer, group) for buffers, group in groups for buffer in buffers):
        flat = buffer.grad_data.clone()
        if is_sharded:
            for bucket in buffer.buckets:
                _gather_data_parallel(flat[bucket.offset :][: len(bucket.grad_data)], group)
        for parameter, (start, end, _) in buffer.param_index_map.items():
            found[parameter] = flat[start:end].view(parameter.shape)
    return found


def _gather_data_parallel(bucket: Tensor, group: dist.ProcessGroup) -> None:
    """Fills ``bucket``: each rank of the distributed optimizer has the sum of its own equal part only."""
    parts = bucket.chunk(dist.get_world_size(group))
    gathered = [torch.empty_like(part) for part in parts]
    dist.all_gather(gathered, parts[dist.get_rank(group)].clone(), group=group)
    bucket.copy_(torch.cat(gathered))


def _gather_cut(gradient: Tensor, rule: Rule, parallel: Parallel) -> Tensor:
    """Full gradient in the canonical layout. For a replicated parameter, this rank's gradient."""
    full = canonical_shard(gradient, rule)
    for cut in rule.cuts(parallel):
        shards = [torch.empty_like(full) for _ in range(cut.size)]
        dist.all_gather(shards, full.contiguous(), group=cut.group)
        full = torch.cat(shards, dim=cut.axis)
    return full
