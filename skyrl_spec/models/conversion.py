"""Conversion of weights between Hugging Face (HF) and Megatron: one table of rules, read in both directions.

A rule brings HF tensors into a *canonical* layout, in which tensor parallelism cuts a single axis: QKV is
``[groups, (heads of a group + 2) * head_dim, D]``, gate and up are ``[2, ffn, D]``. A rank's shard is a chunk along
that axis, flattened to the shape of the Megatron parameter. An export gathers the chunks and inverts the rule.

The weights of all experts of a layer are one parameter. Expert parallelism cuts the axis of experts, and the tensor
parallelism of experts another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from safetensors import safe_open
from torch import Tensor, nn

from skyrl_spec.errors import ConfigError
from skyrl_spec.models import megatron_patches
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.specs.files import weight_files
from skyrl_spec.specs.model import ModelSpec


@dataclass(frozen=True)
class Rule:
    """A Megatron parameter and the HF tensors that it consists of."""

    megatron: str
    hf: tuple[str, ...]
    # Axis of the canonical layout that tensor parallelism cuts. None: replicated.
    shard_axis: int | None
    to_canonical: Callable[[list[Tensor]], Tensor]
    from_canonical: Callable[[Tensor], list[Tensor]]
    # Leading axes of the canonical layout into which the rows of the parameter unfold.
    rows: tuple[int, ...] = (-1,)
    # Axis of experts in the canonical layout. None: every rank of an expert-parallel group has the parameter.
    expert_axis: int | None = None

    @property
    def partition_dim(self) -> int | None:
        """Divided dimension of the parameter, in which all unfolded axes of ``rows`` are dimension 0."""
        axis = self.expert_axis if self.shard_axis is None else self.shard_axis
        return None if axis is None else max(0, axis - len(self.rows) + 1)

    def cuts(self, parallel: Parallel) -> list[Cut]:
        """Who divides which axes."""
        is_expert = self.expert_axis is not None
        tensor_group = parallel.expert_tp_group if is_expert else parallel.tp_group
        by_axis = ((self.shard_axis, tensor_group), (self.expert_axis, parallel.ep_group))
        return [Cut(axis, group) for axis, group in by_axis if axis is not None]


@dataclass(frozen=True)
class Cut:
    """An axis of the canonical layout that the ranks of a group divide."""

    axis: int
    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


def plain(megatron: str, hf: str, shard_axis: int | None) -> Rule:
    """A parameter that equals one HF tensor."""
    return Rule(megatron, (hf,), shard_axis, lambda tensors: tensors[0], lambda full: [full])


def vocab(megatron: str, hf: str, vocab_size: int, padded_size: int) -> Rule:
    """One row per token, with zero rows appended up to ``padded_size``."""

    def pad(tensors: list[Tensor]) -> Tensor:
        padding = tensors[0].new_zeros(padded_size - vocab_size, *tensors[0].shape[1:])
        return torch.cat([tensors[0], padding])

    return Rule(megatron, (hf,), 0, pad, lambda full: [full[:vocab_size]])


def qkv(megatron: str, hf_prefix: str, kind: str, spec: ModelSpec) -> Rule:
    """Query, key and value. Megatron stores, for each query group, its query heads, its key and its value."""
    names = tuple(f"{hf_prefix}{name}_proj.{kind}" for name in "qkv")
    rows = [spec.num_heads // spec.num_kv_heads * spec.head_dim, spec.head_dim, spec.head_dim]

    def merge(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(spec.num_kv_heads, -1, *t.shape[1:]) for t in tensors], dim=1)

    def split(full: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in full.split(rows, dim=1)]

    return Rule(megatron, names, 0, merge, split, rows=(-1, sum(rows)))


def gate_up(megatron: str, hf_prefix: str) -> Rule:
    """Gate and up projections of a SwiGLU, stacked."""
    names = (f"{hf_prefix}gate_proj.weight", f"{hf_prefix}up_proj.weight")
    return Rule(megatron, names, 1, torch.stack, lambda full: list(full.unbind()), rows=(2, -1))


def experts_gate_up(megatron: str, hf_prefix: str, num_experts: int) -> Rule:
    """Gate and up projections of all experts: ``[experts, 2, ffn, D]``."""
    names = tuple(f"{hf_prefix}{e}.{name}_proj.weight" for e in range(num_experts) for name in ("gate", "up"))

    def merge(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).unflatten(0, (num_experts, 2))

    return Rule(megatron, names, 2, merge, lambda full: list(full.flatten(0, 1).unbind()), expert_axis=0)


def experts_down(megatron: str, hf_prefix: str, num_experts: int) -> Rule:
    """Down projections of all experts: ``[experts, D, ffn]``."""
    names = tuple(f"{hf_prefix}{e}.down_proj.weight" for e in range(num_experts))
    return Rule(megatron, names, 2, torch.stack, lambda full: list(full.unbind()), expert_axis=0)


def input_projection(megatron: str, hf: str) -> Rule:
    """Input projection of an MTP layer, with its halves swapped.

    MiMo's ``input_proj`` takes [hidden, embedding], Megatron's ``eh_proj`` takes [embedding, hidden].
    """

    def swap(weight: Tensor) -> Tensor:
        return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)

    return Rule(megatron, (hf,), 0, lambda tensors: swap(tensors[0]), lambda full: [swap(full)])


def layer_rules(megatron: str, hf: str, spec: ModelSpec) -> list[Rule]:
    """Rules of one transformer layer. Both prefixes end in a dot."""
    rules = [
        plain(f"{megatron}input_layernorm.weight", f"{hf}input_layernorm.weight", None),
        qkv(f"{megatron}self_attention.linear_qkv.weight", f"{hf}self_attn.", "weight", spec),
        plain(f"{megatron}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", 1),
        plain(f"{megatron}pre_mlp_layernorm.weight", f"{hf}post_attention_layernorm.weight", None),
        *_mlp_rules(f"{megatron}mlp.", f"{hf}mlp.", spec),
    ]
    if spec.qkv_bias:
        rules.append(qkv(f"{megatron}self_attention.linear_qkv.bias", f"{hf}self_attn.", "bias", spec))
    if spec.qk_norm:
        rules += [
            plain(f"{megatron}self_attention.{name}_layernorm.weight", f"{hf}self_attn.{name}_norm.weight", None)
            for name in "qk"
        ]
    return rules


def _mlp_rules(megatron: str, hf: str, spec: ModelSpec) -> list[Rule]:
    if spec.experts is None:
        return [
            gate_up(f"{megatron}linear_fc1.weight", hf),
            plain(f"{megatron}linear_fc2.weight", f"{hf}down_proj.weight", 1),
        ]
    return [
        plain(f"{megatron}router.weight", f"{hf}gate.weight", None),
        experts_gate_up(f"{megatron}experts.gate_up_E2FD", f"{hf}experts.", spec.experts.num),
        experts_down(f"{megatron}experts.down_EDF", f"{hf}experts.", spec.experts.num),
    ]


def policy_rules(spec: ModelSpec, padded_vocab: int) -> list[Rule]:
    """Rules of the trunk, the embedding and an untied output head."""
    rules = [
        vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", spec.vocab_size, padded_vocab),
        *(
            rule
            for layer in range(spec.num_layers)
            for rule in layer_rules(f"decoder.layers.{layer}.", f"model.layers.{layer}.", spec)
        ),
        plain("decoder.final_layernorm.weight", "model.norm.weight", None),
    ]
    if not spec.tie_word_embeddings:
        rules.append(vocab("output_layer.weight", "lm_head.weight", spec.vocab_size, padded_vocab))
    return rules


def mtp_rules(spec: ModelSpec) -> list[Rule]:
    """Rules of MiMo's first MTP layer, which vLLM serves, as layer 0 of a MultiTokenPredictionBlock."""
    hf, megatron = "model.mtp_layers.0.", "layers.0."
    return [
        plain(f"{megatron}enorm.weight", f"{hf}token_layernorm.weight", None),
        plain(f"{megatron}hnorm.weight", f"{hf}hidden_layernorm.weight", None),
        input_projection(f"{megatron}eh_proj.weight", f"{hf}input_proj.weight"),
        *layer_rules(f"{megatron}transformer_layer.", hf, spec),
        plain(f"{megatron}final_layernorm.weight", f"{hf}final_layernorm.weight", None),
    ]


def dflash_rules(layers: ModelSpec) -> list[Rule]:
    """Rules of a DFlash draft. Embedding and output head are the policy's."""
    return [
        plain("fc.weight", "fc.weight", 0),
        plain("hidden_norm.weight", "hidden_norm.weight", None),
        *(
            rule
            for layer in range(layers.num_layers)
            for rule in layer_rules(f"layers.{layer}.", f"layers.{layer}.", layers)
        ),
        plain("norm.weight", "norm.weight", None),
    ]


class HfTensors:
    """Tensors of a checkpoint directory, read one at a time. ``setting`` is the setting that names the directory."""

    def __init__(self, directory: Path, setting: str = "trainer.policy.model.path"):
        self.directory, self.setting = directory, setting
        self._files: dict[str, Path] = {}
        for file in weight_files(directory, setting):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def names(self) -> list[str]:
        return list(self._files)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ConfigError(f"{self.setting}={self.directory}: has no tensor {name}; the checkpoint is incomplete")
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)


def load_weights(module: nn.Module, rules: list[Rule], tensors: HfTensors, parallel: Parallel) -> None:
    """Fills every parameter of ``module`` with this rank's shard.

    Raises:
        ConfigError: a tensor is missing, or its shape is not the one that ``config.json`` implies.
    """
    parameters = megatron_patches.named_parameters(module)
    assert parameters.keys() == {rule.megatron for rule in rules}, parameters.keys() ^ {rule.megatron for rule in rules}
    for rule in rules:
        parameter = parameters[rule.megatron]
        try:
            canonical = rule.to_canonical([tensors[name] for name in rule.hf])
            for cut in rule.cuts(parallel):
                canonical = canonical.chunk(cut.size, dim=cut.axis)[cut.rank]
            shard = canonical.reshape(parameter.shape)
        except RuntimeError as error:
            raise ConfigError(
                f"{tensors.setting}={tensors.directory}: {', '.join(rule.hf)} does not have the shape that its "
                f"config.json says ({error}); use the config.json of these weights"
            ) from None
        with torch.no_grad():
            parameter.copy_(shard)
        if rule.partition_dim is not None:
            _mark_sharded(parameter, rule.partition_dim)


def export_weights(module: nn.Module, rules: list[Rule], parallel: Parallel) -> Iterator[tuple[str, Tensor]]:
    """HF names and full tensors. All ranks that divide a parameter must iterate, and have them."""
    parameters = megatron_patches.named_parameters(module)
    for rule in rules:
        yield from zip(rule.hf, full_tensors(rule, parameters[rule.megatron], parallel), strict=True)


def full_tensors(rule: Rule, parameter: Tensor, parallel: Parallel) -> list[Tensor]:
    """The HF tensors of ``rule``. Collective over the ranks that divide it, and each has the result."""
    return rule.from_canonical(_gather(parameter.detach(), rule, parallel))


def own_rules(module: nn.Module, rules: list[Rule]) -> list[Rule]:
    """The rules of the parameters that a pipeline stage has."""
    names = megatron_patches.named_parameters(module).keys()
    return [rule for rule in rules if rule.megatron in names]


def hf_shapes(rule: Rule, parameter: Tensor, parallel: Parallel) -> list[torch.Size]:
    """Shapes of the HF tensors of ``rule``, without communication."""
    shard = parameter.detach().to("meta")
    canonical = canonical_shard(shard, rule)
    for cut in rule.cuts(parallel):
        canonical = torch.cat([canonical] * cut.size, dim=cut.axis)
    return [tensor.shape for tensor in rule.from_canonical(canonical)]


def _mark_sharded(parameter: Tensor, dim: int) -> None:
    """Marks ``parameter`` as sharded. Megatron's gradient norm takes unmarked ones from tensor-parallel rank 0 only.

    Megatron sets the mark when it initializes weights, which is skipped here because a checkpoint is read.
    """
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def _gather(shard: Tensor, rule: Rule, parallel: Parallel) -> Tensor:
    canonical = canonical_shard(shard, rule)
    for cut in rule.cuts(parallel):
        if cut.size > 1:
            shards = [torch.empty_like(canonical) for _ in range(cut.size)]
            dist.all_gather(shards, canonical.contiguous(), group=cut.group)
            canonical = torch.cat(shards, dim=cut.axis)
    return canonical


def canonical_shard(shard: Tensor, rule: Rule) -> Tensor:
    """This rank's part of a parameter (or of a tensor of its shape) in the canonical layout."""
    return shard.reshape(*rule.rows, *shard.shape[1:])
