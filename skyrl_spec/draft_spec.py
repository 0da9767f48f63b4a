"""The draft before anything starts: which one is trained, and what a DFlash draft looks like. Imports no torch.

A DFlash draft always starts from a directory: the user's, or one that is written first with fresh weights. Trainer and
engines both read that directory, so they cannot disagree about it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from skyrl_spec.config import Config, ConfigError, DflashConfig, MtpConfig, TrainerConfig
from skyrl_spec.model_spec import ModelSpec, layer_tensor_shapes, model_directory, read_config
from skyrl_spec.rollout.speculative import drafts_under_way

_SETTING = "trainer.dflash"
DRAFT_ARCHITECTURE = "DFlashDraftModel"
# Targets whose hidden states vLLM can hand to a draft.
DFLASH_TARGETS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
DEFAULT_NUM_LAYERS = 5
DEFAULT_BLOCK_SIZE = 16
# Block size -> gamma of the position weights, as published.
_DECAY_GAMMAS = {8: 4.0, 10: 5.0, 16: 7.0}


@dataclass(frozen=True)
class DflashSpec:
    """A DFlash draft's shape: its layers (as those of a model) and how it is fed."""

    layers: ModelSpec
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    # Depth of the target it was made for.
    num_target_layers: int


def trained_draft(trainer: TrainerConfig) -> MtpConfig | DflashConfig | None:
    """The settings of the draft that is trained, if one is."""
    if trainer.mtp.enabled:
        return trainer.mtp
    return trainer.dflash if trainer.dflash.enabled else None


def describe_draft(trainer: TrainerConfig) -> str:
    """One line for the start-up panel."""
    if trainer.mtp.enabled:
        mtp = trainer.mtp
        unroll = mtp.unroll_steps or mtp.num_speculative_tokens
        return f"MTP head, k={mtp.num_speculative_tokens}, trained {unroll} deep, {mtp.loss_type}"
    if trainer.dflash.enabled:
        dflash = trainer.dflash
        return (
            f"DFlash, k={dflash.num_speculative_tokens}, {dflash.num_layers} layers on target layers "
            f"{dflash.target_layer_ids}, block {dflash.block_size}, {dflash.loss_type}"
        )
    return "none"


def default_target_layers(num_target_layers: int, num_layers: int) -> list[int]:
    """``round(1 + j (L - 4) / (n - 1))`` for draft layer j of n on a target of L layers; the middle one for n = 1."""
    if num_layers == 1:
        return [num_target_layers // 2]
    return [round(1 + j * (num_target_layers - 4) / (num_layers - 1)) for j in range(num_layers)]


def decay_gamma(dflash: DflashConfig, block_size: int) -> float:
    """Gamma of the position weights."""
    if dflash.loss_decay_gamma is not None:
        return dflash.loss_decay_gamma
    return _DECAY_GAMMAS.get(block_size, block_size / 2)


def read_dflash_spec(path: str, *, weights: bool = True) -> DflashSpec:
    """The shape of the draft in a directory, or of a hub name (downloaded where it is not cached)."""
    directory = model_directory(path, f"{_SETTING}.path", weights=weights)
    return parse_dflash_spec(directory, read_config(directory, f"{_SETTING}.path"))


def parse_dflash_spec(directory: Path, config: dict[str, Any]) -> DflashSpec:
    """``config.json`` of a draft.

    Raises:
        ConfigError: not a DFlash draft's, or an entry that this trainer cannot follow.
    """
    setting = f"{_SETTING}.path={directory}"
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture != DRAFT_ARCHITECTURE:
        raise ConfigError(
            f"{setting}: is a {architecture}, not a {DRAFT_ARCHITECTURE}; give a DFlash draft's directory"
        )
    dflash = config.get("dflash_config") or {}
    _refuse_unsupported(setting, config, dflash)
    try:
        rope = config.get("rope_parameters") or {}
        return DflashSpec(
            layers=ModelSpec(
                path=directory,
                architecture=architecture,
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                ffn_hidden_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                rms_norm_eps=config["rms_norm_eps"],
                # What vLLM takes where it is absent.
                rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 1e6),
                max_position_embeddings=config["max_position_embeddings"],
                tie_word_embeddings=False,
                qkv_bias=False,
                qk_norm=True,
                num_mtp_layers=0,
            ),
            block_size=config["block_size"],
            target_layer_ids=tuple(dflash["target_layer_ids"]),
            mask_token_id=dflash["mask_token_id"],
            num_target_layers=config["num_target_layers"],
        )
    except KeyError as error:
        raise ConfigError(f"{setting}: config.json has no {error}; it is needed") from None


def _refuse_unsupported(setting: str, config: dict[str, Any], dflash: dict[str, Any]) -> None:
    """Entries that would be computed wrongly, without an error, if they were ignored."""
    unsupported = {
        "dflash_config.causal": dflash.get("causal", False),
        "dflash_config.use_swa": dflash.get("use_swa", False),
        "attention_bias": config.get("attention_bias", False),
        "layer_types": any(kind != "full_attention" for kind in config.get("layer_types") or ()),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "draft_vocab_size": config.get("draft_vocab_size") not in (None, config.get("vocab_size")),
        "rope_scaling": bool(config.get("rope_scaling")),
        # transformers 5 writes the scaling here.
        "rope_parameters.rope_type": (config.get("rope_parameters") or {}).get("rope_type", "default") != "default",
        "target_hidden_size": config.get("target_hidden_size") not in (None, config.get("hidden_size")),
    }
    for name, found in unsupported.items():
        if found:
            raise ConfigError(f"{setting}: {name} of its config.json is not supported; use a draft without it")


def fresh_dflash_spec(dflash: DflashConfig, target: ModelSpec, mask_token_id: int) -> DflashSpec:
    """The shape of a draft from scratch: layers like the target's."""
    num_layers = dflash.num_layers or DEFAULT_NUM_LAYERS
    ids = dflash.target_layer_ids or default_target_layers(target.num_layers, num_layers)
    layers = replace(
        target,
        path=Path(),
        architecture=DRAFT_ARCHITECTURE,
        num_layers=num_layers,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        num_mtp_layers=0,
    )
    return DflashSpec(layers, dflash.block_size or DEFAULT_BLOCK_SIZE, tuple(ids), mask_token_id, target.num_layers)


def plan_dflash(
    config: Config, target: ModelSpec, found: DflashSpec | None, mask_token_id: int | None = None
) -> DflashSpec:
    """The draft that ``trainer.dflash`` asks for, checked against its target.

    Args:
        found: what ``trainer.dflash.path`` holds; None: a draft from scratch.
        mask_token_id: what ``resolve_mask_token`` found; without it (no tokenizer at hand) it is not checked.

    Raises:
        ConfigError: for the first thing that does not fit.
    """
    dflash = config.trainer.dflash
    if target.architecture not in DFLASH_TARGETS:
        raise ConfigError(
            f"{_SETTING}.enabled=true: vLLM cannot hand the hidden states of a {target.architecture} to a draft; use "
            f"a {' or '.join(DFLASH_TARGETS)}, or trainer.mtp.enabled=true for a model with an MTP head"
        )
    spec = fresh_dflash_spec(dflash, target, mask_token_id or 0) if found is None else found
    if found is not None:
        _check_settings_agree(dflash, spec)
    _check_target_layers(dflash, spec, target)
    _check_fit(config, spec, target)
    return spec


def decided(config: Config, spec: DflashSpec, path: str) -> Config:
    """``config`` with everything that was left open about its DFlash draft."""
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
    """A setting that says something else than the draft's own config.json would do nothing."""
    found = {
        "num_layers": spec.layers.num_layers,
        "block_size": spec.block_size,
        "target_layer_ids": list(spec.target_layer_ids),
        "mask_token_id": spec.mask_token_id,
    }
    for name, value in found.items():
        wanted = getattr(dflash, name)
        if wanted is not None and wanted != value:
            _refuse(name, wanted, f"the draft at {_SETTING}.path={dflash.path} has {value}; leave it null")


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
    dflash, where = config.trainer.dflash, f"the draft at {_SETTING}.path={config.trainer.dflash.path}"
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
    length = config.trainer.max_prompt_length + max(
        generator.sampling_params.max_generate_length, generator.eval_sampling_params.max_generate_length
    )
    # vLLM drafts nothing, and does not say so, where drafts under way do not fit into the draft's positions.
    num_drafts = drafts_under_way(config.trainer.placement.device)
    needed = min(length + num_drafts * (tokens or spec.block_size - 1), target.max_position_embeddings)
    if spec.layers.max_position_embeddings < needed:
        raise ConfigError(
            "generator.sampling_params.max_generate_length: with trainer.max_prompt_length and room for "
            f"{num_drafts} drafts a rollout needs {needed} positions, but {where} has "
            f"{spec.layers.max_position_embeddings}; lower one"
        )


def resolve_mask_token(found: int | None, tokenizer: Any, vocab_size: int) -> int:
    """The token that fills the slots to be drafted: ``found`` if not None, else the tokenizer's, else an unused row.

    Raises:
        ConfigError: none is free, or the one set is the padding or end token (drafts would be garbage).
    """
    token = found
    if token is None:
        token = tokenizer.mask_token_id
    if token is None:
        token = 1 + max(tokenizer.get_vocab().values())
    if token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        _refuse("mask_token_id", token, "is the padding or end token, which the draft must tell apart; use another")
    if not 0 <= token < vocab_size:
        raise ConfigError(
            f"{_SETTING}.mask_token_id=null: the tokenizer has no mask token and all {vocab_size} rows of the "
            "vocabulary are used; set it to a token that never occurs"
        )
    return token


def dflash_tensor_shapes(spec: DflashSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a draft's checkpoint."""
    hidden = spec.layers.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(spec.target_layer_ids) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(spec.layers.num_layers):
        shapes |= layer_tensor_shapes(spec.layers, f"layers.{layer}.")
    return shapes


def hf_config(spec: DflashSpec, dtype: str, rope_scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    """``config.json`` of a draft as vLLM reads it; ``dtype`` as in "float32"."""
    layers = spec.layers
    config: dict[str, Any] = {
        "architectures": [DRAFT_ARCHITECTURE],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": layers.hidden_size,
        "intermediate_size": layers.ffn_hidden_size,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "num_key_value_heads": layers.num_kv_heads,
        "head_dim": layers.head_dim,
        "rms_norm_eps": layers.rms_norm_eps,
        "rope_theta": layers.rope_theta,
        "max_position_embeddings": layers.max_position_embeddings,
        "vocab_size": layers.vocab_size,
        "tie_word_embeddings": False,
        "block_size": spec.block_size,
        "num_target_layers": spec.num_target_layers,
        "dflash_config": {
            "mask_token_id": spec.mask_token_id,
            "target_layer_ids": list(spec.target_layer_ids),
            "causal": False,
        },
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if rope_scaling is not None:
        config["rope_scaling"] = rope_scaling
    return config


def _refuse(name: str, value: object, message: str) -> NoReturn:
    raise ConfigError(f"{_SETTING}.{name}={value}: {message}")
