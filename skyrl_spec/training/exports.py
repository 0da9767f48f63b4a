"""Weights of policy and draft in the layout that engines load, from the pipeline stages that have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.conversion import Rule, full_tensors, policy_rules
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.files import Shapes
from skyrl_spec.specs.model import ModelSpec, padded_vocab_size, tensor_shapes
from skyrl_spec.specs.stages import Stages
from skyrl_spec.types import Component


@dataclass(frozen=True)
class Exports:
    """Names, shapes and tensors of an export. Every rank knows the first two. ``dtype`` is that of all parameters."""

    config: Config
    spec: ModelSpec
    parallel: Parallel
    stages: Stages
    dtype: torch.dtype

    @cached_property
    def rules(self) -> dict[Component, list[Rule]]:
        """Rules of all parameters of each component, in the order of export."""
        trainer = self.config.trainer
        kind = trained_kind(trainer)
        padded_size = padded_vocab_size(self.spec.vocab_size, self.parallel.tp_size)
        rules: dict[Component, list[Rule]] = {"policy": policy_rules(self.spec, padded_size)}
        return rules if kind is None else rules | {"draft": kind.rules(trainer, self.spec)}

    def shapes(self, component: Component) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor, in the order of ``tensors``. No communication."""
        by_name = self._shapes(component)
        return [(name, self.dtype, by_name[name]) for rule in self.rules[component] for name in rule.hf]

    def tensors(self, component: Component, module: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
        """HF names and full tensors. All ranks that ``takes_part`` must iterate.

        Args:
            module: this rank's part. None if it has none.
        """
        parameters = {} if module is None else megatron_patches.named_parameters(module)
        by_name, device = self._shapes(component), self.parallel.device
        for rule in self.rules[component]:
            stage = self._stage(component, rule)
            if stage == self.parallel.pp_rank:
                full = full_tensors(rule, parameters[rule.megatron], self.parallel)
            else:
                full = [torch.empty(by_name[name], dtype=self.dtype, device=device) for name in rule.hf]
            for name, tensor in zip(rule.hf, full, strict=True):
                yield name, self._from_stage(tensor, stage)

    @property
    def takes_part(self) -> bool:
        """Whether the first replica cannot export without this rank."""
        return self.parallel.replica == 0 or self.parallel.divides_experts

    @property
    def draft_source(self) -> Path | None:
        """Checkpoint directory with the draft's tensors. None without a draft."""
        kind = trained_kind(self.config.trainer)
        if kind is None or not kind.has_own_directory:
            return None if kind is None else self.spec.path
        path = kind.path(self.config.trainer)
        assert path is not None, "a draft from scratch is written to a directory first"
        return Path(path)

    def draft_hf_config(self) -> dict[str, Any] | None:
        """``config.json`` of the exported draft. None without a draft with its own directory."""
        kind = trained_kind(self.config.trainer)
        return None if kind is None else kind.hf_config(self.config.trainer, str(self.dtype).removeprefix("torch."))

    def _shapes(self, component: Component) -> Shapes:
        if component == "policy":
            return tensor_shapes(self.spec)
        kind = trained_kind(self.config.trainer)
        assert kind is not None
        return kind.shapes(self.config, self.spec, kind.path(self.config.trainer)).tensors

    def _stage(self, component: Component, rule: Rule) -> int:
        return self.stages.of_parameter(rule.megatron) if component == "policy" else self.parallel.pp_size - 1

    def _from_stage(self, tensor: Tensor, stage: int) -> Tensor:
        if self.parallel.pp_size == 1:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, self.parallel.rank_of_stage(stage), group=self.parallel.pp_group)
        return tensor
