"""Settings of the draft: MTP head, DFlash, and the warm-up before reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyrl_spec.settings.allowed import FROM_ONE, NOT_NEGATIVE, POSITIVE, SHARE, Range
from skyrl_spec.settings.field import setting

_LOSS_TYPE_DOC = (
    "The draft's loss. soft_ce: cross-entropy against the policy's distribution. topk_soft_ce: against its loss_topk "
    "most probable tokens. hard_ce: against the sampled token. tv: total variation distance from the policy's "
    "distribution, which is the share of sampled drafts that are rejected. accept: share of drafted tokens that are "
    "rejected, each only if all before it were accepted. Or a sum of them with weights, as in 0.7*soft_ce+0.3*accept."
)


@dataclass
class OptimizerConfig:
    """Megatron's Adam with decoupled weight decay. Steps are optimizer steps, not training steps."""

    lr: float = setting(1e-6, "Peak learning rate.", NOT_NEGATIVE)
    min_lr: float = setting(
        0.0, "Learning rate at the end of a cosine or linear schedule. Must not exceed lr.", NOT_NEGATIVE
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay, as in AdamW.", NOT_NEGATIVE)
    adam_betas: list[float] = setting(
        lambda: [0.9, 0.95],
        "Adam's beta1 and beta2: decay rates of the running means of the gradient and of its square.",
    )
    adam_eps: float = setting(1e-8, "Constant added to Adam's denominator.", POSITIVE)
    max_grad_norm: float = setting(1.0, "Largest gradient norm. Larger gradients are scaled down to it.", POSITIVE)
    num_warmup_steps: int = setting(0, "Steps over which the learning rate rises linearly to lr.", NOT_NEGATIVE)
    scheduler: str = setting(
        "constant",
        "Learning-rate schedule after warm-up. cosine and linear decay to min_lr over the whole run.",
        ("constant", "cosine", "linear"),
    )
    offload_after_step: bool | None = setting(
        None,
        "Keep optimizer state and gradients in host memory while engines generate. null: true where "
        "engines sleep (trainer.placement.colocate_all), else false.",
    )


@dataclass
class MtpConfig:
    """The model's own MTP head as the draft, trained with the policy in every step."""

    enabled: bool = setting(False, "Draft with the MTP head and train it.")
    num_speculative_tokens: int = setting(
        3, "Tokens drafted at a time, k. The engines run the head k times for one draft.", FROM_ONE
    )
    unroll_steps: int | None = setting(
        None,
        "Number of consecutive positions that the head is trained to draft, each from its own output at the position "
        "before. null: num_speculative_tokens.",
        FROM_ONE,
    )
    loss_type: str = setting("soft_ce", _LOSS_TYPE_DOC)
    loss_topk: int = setting(32, "Number of tokens that topk_soft_ce keeps of the policy's distribution.", FROM_ONE)
    loss_chunk_size: int = setting(
        1024, "Tokens whose logits the draft's loss holds in memory at the same time.", FROM_ONE
    )
    positions_per_step: float = setting(
        0.5,
        "Share of the response positions whose drafts are trained in an optimizer step, drawn anew in each. 1.0: all.",
        SHARE,
    )
    optimizer_config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


@dataclass
class DflashConfig:
    """A DFlash block-diffusion draft, trained with the policy in every step.

    A draft at path brings its own shape: leave num_layers, block_size, target_layer_ids and mask_token_id null.
    """

    enabled: bool = setting(False, "Draft with the DFlash draft and train it.")
    path: str | None = setting(
        None,
        "Directory or hub name of the draft to start from. null: start from random weights, with the width, heads and "
        "RoPE of the policy.",
    )
    num_layers: int | None = setting(
        None, "Layers of the draft. null: as the draft at path has, or 5 from scratch.", FROM_ONE
    )
    block_size: int | None = setting(
        None,
        "Slots of a block: one for the last sampled token, the others for drafted tokens. null: as the draft at path "
        "has, or 16 from scratch.",
        Range(2),
    )
    num_speculative_tokens: int | None = setting(
        None, "Tokens drafted at a time. Must be below block_size. null: block_size - 1.", FROM_ONE
    )
    target_layer_ids: list[int] | None = setting(
        None,
        "Layers of the policy whose outputs the draft reads, counted from 0, ascending. null: as the draft at path "
        "has, or evenly spread from scratch.",
    )
    mask_token_id: int | None = setting(
        None,
        "Token that fills the slots to be drafted. null: as the draft at path has. From scratch: the tokenizer's mask "
        "token, or else the first id after the tokenizer's last token.",
        NOT_NEGATIVE,
    )
    anchors_per_sequence: int = setting(
        128,
        "Blocks that each sequence is trained on in a step, at most. Each block begins at a randomly drawn response "
        "token.",
        FROM_ONE,
    )
    loss_type: str = setting("soft_ce", _LOSS_TYPE_DOC)
    loss_topk: int = setting(32, "Number of tokens that topk_soft_ce keeps of the policy's distribution.", FROM_ONE)
    loss_decay_gamma: float | None = setting(
        None,
        "Drafted token i of a block, counted from 1, has weight exp(-(i - 1) / gamma) in the loss. null: 4, 5 or 7 "
        "for 7, 9 or 15 drafted tokens, otherwise half of (drafted tokens + 1).",
        POSITIVE,
    )
    loss_chunk_size: int = setting(
        1024, "Tokens whose logits the draft's loss holds in memory at the same time.", FROM_ONE
    )
    export_rope_scaling: dict[str, Any] | None = setting(
        None,
        "RoPE scaling to write into the config.json of an exported draft, such as {rope_type: yarn, factor: 4.0}. "
        "Training does not use it.",
    )
    positions_per_step: float = setting(
        0.5,
        "Share of the blocks (anchors_per_sequence) that are trained in an optimizer step, drawn anew in each. "
        "1.0: all.",
        SHARE,
    )
    optimizer_config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


@dataclass
class DraftTrainingConfig:
    """When the draft is trained, whichever it is."""

    train: str = setting(
        "every_step",
        "Training steps that train the draft and send it to the engines: every_step, every:N (the first, and then "
        "every N-th), auto (while training costs fewer seconds than rollouts lose with a draft left alone), or off "
        "(none: the engines keep the draft that the run began with).",
    )


@dataclass
class WarmupConfig:
    """``skyrl-spec warmup-draft``: trains the draft on responses of the frozen policy."""

    run_dir: str | None = setting(None, "Output directory. null: trainer.run_dir with _warmup appended.")
    from_scratch: bool = setting(
        True, "Start from random weights. false: start from trainer.dflash.path or the checkpoint's MTP head."
    )
    num_steps: int = setting(200, "Training steps, each on trainer.train_batch_size prompts.", FROM_ONE)
    update_epochs_per_batch: int = setting(1, "Passes over each batch of responses.", FROM_ONE)
    positions_per_step: float = setting(
        1.0, "positions_per_step of the draft (trainer.mtp, trainer.dflash) in the warm-up.", SHARE
    )
    optimizer_config: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=6e-4, scheduler="cosine", num_warmup_steps=20)
    )
