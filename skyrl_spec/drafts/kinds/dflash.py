"""DFlash as a kind of draft. It has its own directory; vLLM's method is ``dflash``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from skyrl_spec.drafts.kinds.kind import DraftKind, DraftShapes, require_user_speculation
from skyrl_spec.drafts.shares import mean_number
from skyrl_spec.drafts.speculation import drafts_under_way
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.derived import max_input_length, parallel_sizes
from skyrl_spec.settings.draft import DflashConfig
from skyrl_spec.settings.schema import Config, TrainerConfig
from skyrl_spec.specs import flops
from skyrl_spec.specs.dflash import (
    DFLASH_PATH,
    DFLASH_TARGETS,
    DRAFT_ARCHITECTURE,
    DflashSpec,
    dflash_tensor_shapes,
    exported_dflash_config,
    fresh_dflash_spec,
    read_dflash_config,
    read_dflash_spec,
)
from skyrl_spec.specs.files import require_tensors
from skyrl_spec.specs.flops import Flops
from skyrl_spec.specs.model import ModelSpec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from skyrl_spec.drafts.base import Draft
    from skyrl_spec.models.conversion import Rule
    from skyrl_spec.models.parallel import Parallel


class DflashKind(DraftKind):
    """A DFlash block-diffusion draft."""

    method = "dflash"
    has_own_directory = True
    on_setting = "trainer.dflash.enabled"

    def describe(self, trainer: TrainerConfig) -> str:
        dflash = trainer.dflash
        return (
            f"DFlash, k={dflash.num_speculative_tokens}, {dflash.num_layers} layers on target layers "
            f"{dflash.target_layer_ids}, block {dflash.block_size}, {dflash.loss_type}"
        )

    def check_user_speculation(self, user: dict[str, Any]) -> None:
        require_user_speculation(
            user.get("method") == "dflash" and user.keys().isdisjoint(("model", "num_speculative_tokens")),
            user,
            "must be of method dflash, without model and num_speculative_tokens (trainer.dflash has them), while "
            "trainer.dflash.enabled trains that draft; change it or turn dflash off",
        )

    def path(self, trainer: TrainerConfig) -> str | None:
        return trainer.dflash.path

    def with_path(self, trainer: TrainerConfig, path: str | None) -> TrainerConfig:
        return self.with_settings(trainer, path=path)

    def preflight(self, config: Config, spec: ModelSpec, *, from_scratch: bool) -> None:
        path = config.trainer.dflash.path
        draft = plan_dflash(config, spec, None if path is None else read_dflash_config(path))
        layers, tp = draft.layers, parallel_sizes(config).tp
        if layers.num_heads % tp or layers.num_kv_heads % tp or layers.ffn_hidden_size % tp:
            raise ConfigError(
                f"trainer.policy.megatron_config.tensor_model_parallel_size={tp}: must divide the draft's "
                f"{layers.num_heads} heads, {layers.num_kv_heads} key-value heads and {layers.ffn_hidden_size} "
                "feed-forward columns; choose a divisor"
            )
        if path is not None:
            require_tensors(path, DFLASH_PATH, dflash_tensor_shapes(draft))

    def decide(self, config: Config, spec: ModelSpec, tokenizer: Any, *, may_write: bool) -> Config:
        dflash = config.trainer.dflash
        existing = None if dflash.path is None else read_dflash_spec(dflash.path, weights=may_write)
        mask_token_id = dflash.mask_token_id if existing is None else existing.mask_token_id
        draft = plan_dflash(config, spec, existing, resolve_mask_token(mask_token_id, tokenizer, spec.vocab_size))
        if dflash.path is not None:
            return decided(config, draft, dflash.path)
        directory = (Path(config.trainer.run_dir) / "draft_start").resolve()
        if may_write:
            from skyrl_spec.drafts.fresh import write_fresh_dflash

            write_fresh_dflash(draft, directory, config.trainer.policy.megatron_config.dtype, config.trainer.seed)
        return decided(config, draft, str(directory))

    def shapes(
        self, config: Config, spec: ModelSpec, path: str | None, *, may_be_unwritten: bool = False
    ) -> DraftShapes:
        if path is None or may_be_unwritten:
            draft = _spec_at(config, spec, path)
        else:
            draft = read_dflash_spec(path, weights=False)
        return DraftShapes(dflash_tensor_shapes(draft), draft.layers.num_layers)

    def training_layer_tokens(self, config: Config, spec: ModelSpec, tokens: int) -> int:
        trainer = config.trainer
        draft = _spec_at(config, spec, trainer.dflash.path)
        # Of short documents, which fill a pass of the draft (``DflashDraft.max_slots``).
        return max(trainer.max_tokens_per_microbatch, draft.block_size) * draft.layers.num_layers

    def training_flops(self, config: Config, spec: ModelSpec, prompt: int, response: int) -> Flops:
        dflash, draft = config.trainer.dflash, _spec_at(config, spec, config.trainer.dflash.path)
        layers, num_drafted = draft.layers, dflash.num_speculative_tokens or draft.block_size - 1
        num_anchors = min(max(response - 1, 0), dflash.anchors_per_sequence)
        probability, mean_anchors = mean_number(num_anchors, dflash.positions_per_step)
        blocks = probability * mean_anchors
        slots = blocks * (num_drafted + 1)
        # The last of m random anchors is at m / (m + 1) of the response.
        num_read = probability * (prompt + response * mean_anchors / (mean_anchors + 1))
        captured = flops.linear(num_read, len(draft.target_layer_ids) * spec.hidden_size, spec.hidden_size)
        context_keys = flops.key_value(layers, num_read)
        # Slots behind the end of the response have no loss. Each slot has a teacher's logits of its own.
        supervised = blocks * num_drafted * (1 - num_drafted / (2 * max(response, num_drafted)))
        return Flops(
            # What the policy captured gets no gradient.
            (flops.TRAINED - 1) * captured
            + flops.TRAINED * layers.num_layers * (context_keys + flops.layer(layers, slots))
            + 3 * flops.head(spec, supervised),
            flops.ATTENTION_TRAINED
            * layers.num_layers
            * flops.attention(layers, slots * (prompt + response / 2 + num_drafted + 1)),
        )

    def speculative_config(self, trainer: TrainerConfig) -> dict[str, Any]:
        dflash = trainer.dflash
        return {
            "method": "dflash",
            "model": dflash.path,
            "num_speculative_tokens": dflash.num_speculative_tokens,
        }

    def frozen_config(self, trainer: TrainerConfig) -> dict[str, Any]:
        dflash = trainer.dflash
        if dflash.path is None:
            raise ConfigError(
                f"{DFLASH_PATH}=null: a frozen draft with random weights is of no use; "
                "set it to a trained draft, such as one from skyrl-spec warmup-draft"
            )
        tokens = dflash.num_speculative_tokens or read_dflash_spec(dflash.path).block_size - 1
        return self.speculative_config(trainer) | {"num_speculative_tokens": tokens}

    def max_draft_tokens(self, draft: Path | None) -> int | None:
        return None if draft is None else read_dflash_spec(str(draft)).block_size - 1

    def is_in(self, config: dict[str, Any]) -> bool:
        return (config.get("architectures") or ["none"])[0] == DRAFT_ARCHITECTURE

    def build(self, config: Config, spec: ModelSpec, trunk: TransformerConfig, parallel: Parallel) -> Draft:
        from skyrl_spec.drafts.base import RolloutSampling
        from skyrl_spec.drafts.dflash import DflashDraft

        trainer, sampling = config.trainer, RolloutSampling.of(config.generator)
        return DflashDraft(
            trainer.dflash, spec, trunk, parallel, sampling, trainer.seed, trainer.max_tokens_per_microbatch
        )

    def rules(self, trainer: TrainerConfig, spec: ModelSpec) -> list[Rule]:
        from skyrl_spec.models.conversion import dflash_rules

        assert trainer.dflash.path is not None
        return dflash_rules(read_dflash_spec(trainer.dflash.path).layers)

    def num_positions(self, config: Config, spec: ModelSpec) -> int:
        dflash = config.trainer.dflash
        return dflash.num_speculative_tokens or _spec_at(config, spec, dflash.path).block_size - 1

    def captured_layers(self, config: Config, spec: ModelSpec) -> list[int]:
        return list(_spec_at(config, spec, config.trainer.dflash.path).target_layer_ids)

    def hf_config(self, trainer: TrainerConfig, torch_dtype: str) -> dict[str, Any]:
        dflash = trainer.dflash
        assert dflash.path is not None
        return exported_dflash_config(read_dflash_spec(dflash.path), torch_dtype, dflash)


def plan_dflash(
    config: Config, target: ModelSpec, existing: DflashSpec | None, mask_token_id: int | None = None
) -> DflashSpec:
    """Draft that ``trainer.dflash`` describes, checked against the policy ``target``.

    Args:
        existing: the draft at ``trainer.dflash.path``. None: a draft from scratch.
        mask_token_id: result of ``resolve_mask_token``. None, if no tokenizer is at hand: it is not checked.

    Raises:
        ConfigError: the draft does not fit.
    """
    dflash = config.trainer.dflash
    if target.architecture not in DFLASH_TARGETS:
        raise ConfigError(
            f"trainer.dflash.enabled=true: vLLM cannot hand the hidden states of a {target.architecture} to a draft; "
            f"use a {' or '.join(DFLASH_TARGETS)}, or trainer.mtp.enabled=true for a model with an MTP head"
        )
    spec = fresh_dflash_spec(dflash, target, mask_token_id or 0) if existing is None else existing
    if existing is not None:
        _check_settings_agree(dflash, spec)
    _check_target_layers(dflash, spec, target)
    _check_fit(config, spec, target)
    return spec


def decided(config: Config, spec: DflashSpec, path: str) -> Config:
    """``config`` with every open setting of its DFlash draft filled in from ``spec``."""
    dflash = replace(
        config.trainer.dflash,
        path=path,
        num_layers=spec.layers.num_layers,
        block_size=spec.block_size,
        num_speculative_tokens=config.trainer.dflash.num_speculative_tokens or spec.block_size - 1,
        target_layer_ids=list(spec.target_layer_ids),
        mask_token_id=spec.mask_token_id,
    )
    return replace(config, trainer=replace(config.trainer, dflash=dflash))


def _check_settings_agree(dflash: DflashConfig, spec: DflashSpec) -> None:
    """Refuses a setting that differs from the draft's config.json, because it would have no effect."""
    in_draft = {
        "num_layers": spec.layers.num_layers,
        "block_size": spec.block_size,
        "target_layer_ids": list(spec.target_layer_ids),
        "mask_token_id": spec.mask_token_id,
    }
    for name, value in in_draft.items():
        setting = getattr(dflash, name)
        if setting is not None and setting != value:
            _refuse(name, setting, f"the draft at {DFLASH_PATH}={dflash.path} has {value}; leave it null")


def _check_target_layers(dflash: DflashConfig, spec: DflashSpec, target: ModelSpec) -> None:
    ids, depth = list(spec.target_layer_ids), target.num_layers
    if spec.num_target_layers != depth:
        _refuse("path", dflash.path, f"the draft is for a target of {spec.num_target_layers} layers, not of {depth}")
    if not all(0 <= layer < depth for layer in ids):
        _refuse("target_layer_ids", ids, f"must be layers of the target, 0 to {depth - 1}; change it")
    if ids != sorted(set(ids)):
        if dflash.target_layer_ids is None and dflash.path is None:
            _refuse(
                "num_layers",
                spec.layers.num_layers,
                f"a target of {depth} layers is too shallow to give each a layer of its own (the rule gives {ids}); "
                "lower it or set target_layer_ids",
            )
        _refuse("target_layer_ids", ids, "must be ascending, each layer once; change it")


def _check_fit(config: Config, spec: DflashSpec, target: ModelSpec) -> None:
    dflash, where = config.trainer.dflash, f"the draft at {DFLASH_PATH}={config.trainer.dflash.path}"
    if spec.layers.hidden_size != target.hidden_size:
        _refuse(
            "path", dflash.path, f"its hidden_size {spec.layers.hidden_size} is not the target's {target.hidden_size}"
        )
    if spec.layers.vocab_size != target.vocab_size:
        _refuse("path", dflash.path, f"its vocab_size {spec.layers.vocab_size} is not the target's {target.vocab_size}")
    if spec.block_size < 2:
        _refuse("block_size", spec.block_size, "must be at least 2: the sampled token and a drafted one; raise it")
    tokens = dflash.num_speculative_tokens
    if tokens is not None and tokens >= spec.block_size:
        _refuse(
            "num_speculative_tokens",
            tokens,
            f"must be below the block size {spec.block_size}, of which the first slot is the sampled token; lower it",
        )
    if not 0 <= spec.mask_token_id < target.vocab_size:
        _refuse("mask_token_id", spec.mask_token_id, f"must be a row of the vocabulary, below {target.vocab_size}")
    generator = config.generator
    length = max_input_length(config) + max(
        generator.sampling_params.max_generate_length, generator.eval_sampling_params.max_generate_length
    )
    # vLLM silently drafts nothing if the drafts under way do not fit into the draft's positions.
    num_drafts = drafts_under_way(config.trainer.placement.device)
    needed = min(length + num_drafts * (tokens or spec.block_size - 1), target.max_position_embeddings)
    if spec.layers.max_position_embeddings < needed:
        raise ConfigError(
            "generator.sampling_params.max_generate_length: with trainer.max_prompt_length and room for "
            f"{num_drafts} drafts a rollout needs {needed} positions, but {where} has "
            f"{spec.layers.max_position_embeddings}; lower one"
        )


def resolve_mask_token(mask_token_id: int | None, tokenizer: Any, vocab_size: int) -> int:
    """Token id for the masked slots: ``mask_token_id``, else the tokenizer's mask token, else an unused row.

    Raises:
        ConfigError: no row is unused, or the token is the padding or end token, which would ruin the drafts.
    """
    token = mask_token_id
    if token is None:
        token = tokenizer.mask_token_id
    if token is None:
        token = 1 + max(tokenizer.get_vocab().values())
    if token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        _refuse("mask_token_id", token, "is the padding or end token; set it to a token that never occurs in text")
    if not 0 <= token < vocab_size:
        raise ConfigError(
            f"trainer.dflash.mask_token_id=null: the tokenizer has no mask token and all {vocab_size} rows of the "
            "vocabulary are used; set it to a token that never occurs"
        )
    return token


def _refuse(name: str, value: object, message: str) -> NoReturn:
    raise ConfigError(f"trainer.dflash.{name}={value}: {message}")


def _spec_at(config: Config, target: ModelSpec, path: str | None) -> DflashSpec:
    """The draft at ``path``, or the one that the settings describe if it is from scratch and not written yet."""
    if path is None or (Path(path).is_absolute() and not Path(path).exists()):
        return fresh_dflash_spec(config.trainer.dflash, target, 0)
    return read_dflash_spec(path, weights=False)
