"""Settings of the algorithm: advantages, policy objective, which groups are trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

from skyrl_spec.settings.allowed import (
    ADVANTAGE_ESTIMATORS,
    FROM_ONE,
    LOSS_REDUCTIONS,
    NOT_NEGATIVE,
    POLICY_LOSS_TYPES,
    POSITIVE,
    RATIO_ANCHORS,
    SHARE,
    Range,
)
from skyrl_spec.settings.field import setting


@dataclass
class DynamicSamplingConfig:
    """DAPO's dynamic sampling. A group is all responses to one prompt; equal rewards teach GRPO nothing."""

    type: str | None = setting(
        None, "filter: drop groups with equal rewards and sample new prompts. null: keep all groups.", ("filter",)
    )
    max_sample_batches: int = setting(
        10, "Largest number of batches sampled for one step. The step then trains on the groups it has.", FROM_ONE
    )


@dataclass
class OverlongConfig:
    """DAPO's penalty on long responses. It grows linearly over the last buffer_len tokens of max_generate_length."""

    buffer_len: int = setting(
        0, "Tokens before max_generate_length at which the penalty begins. 0: no penalty.", NOT_NEGATIVE
    )
    penalty_factor: float = setting(
        1.0, "Penalty on the reward of a response of max_generate_length tokens.", NOT_NEGATIVE
    )


@dataclass
class AlgorithmConfig:
    """Advantages and policy objective. GRPO is DAPO with eps_clip_low = eps_clip_high and no dynamic sampling."""

    policy_loss_type: str = setting(
        "regular",
        "Objective of the policy. regular: the clipped surrogate of PPO, GRPO and DAPO. gspo: the same with one ratio "
        "for a whole response. cispo: the policy gradient of every token, weighted with its clipped ratio.",
        POLICY_LOSS_TYPES,
    )
    router_replay: bool = setting(
        False,
        "Of a mixture of experts: send the tokens of a response to the same experts in training as the engine did. "
        "Engine and trainer round differently, so that a token whose choice is close may go elsewhere.",
    )
    advantage_estimator: str = setting(
        "grpo",
        "grpo: a response's reward minus the mean reward of all responses to its prompt. rloo: minus the mean reward "
        "of the other responses. reinforce++: minus the mean over all tokens of the batch, divided by the standard "
        "deviation over them.",
        ADVANTAGE_ESTIMATORS,
    )
    grpo_norm_by_std: bool = setting(
        True, "Divide grpo's advantages by the standard deviation of the rewards of the prompt. false: Dr. GRPO."
    )
    eps_clip_low: float = setting(
        0.2, "Clip the ratio of new to old probability below 1 - eps_clip_low. 1: no lower bound.", SHARE
    )
    eps_clip_high: float = setting(
        0.2,
        "Clip the ratio of new to old probability above 1 + eps_clip_high. Larger than eps_clip_low: DAPO's "
        "clip-higher.",
        POSITIVE,
    )
    clip_ratio_c: float | None = setting(
        None,
        "Bound c > 1 of the dual-clip objective: the loss of a token with a negative advantage A is at most c |A|. "
        "null: no dual clip.",
        Range(1, low_open=True),
    )
    loss_reduction: str = setting(
        "token_mean",
        "How the token losses of a mini-batch are averaged. token_mean: over all tokens. sequence_mean: over the "
        "tokens of each sequence, then over the sequences. seq_mean_token_sum_norm: their sum divided by sequences x "
        "max_generate_length (x max_turns).",
        LOSS_REDUCTIONS,
    )
    use_kl_loss: bool = setting(
        False, "Add a KL penalty to the initial policy. The workers keep a frozen copy of that policy."
    )
    kl_loss_coef: float = setting(0.001, "Weight of the KL penalty.", NOT_NEGATIVE)
    ratio_anchor: str | None = setting(
        None,
        "What the loss compares the policy with. old: the policy before the step, by a forward pass. rollout: the "
        "log-probs that the engines sampled with; that corrects older batches without use_tis, bounds how far the "
        "policy moves from the one that sampled them, and needs no forward pass. null: rollout with "
        "trainer.fully_async, unless use_tis is set, else old.",
        RATIO_ANCHORS,
    )
    use_tis: bool | None = setting(
        None,
        "Truncated importance sampling: multiply each token's loss by its probability in the trainer over that in the "
        "engine, at most tis_imp_ratio_cap. null: true with trainer.fully_async and ratio_anchor=old, else false.",
    )
    tis_imp_ratio_cap: float = setting(2.0, "Largest factor of use_tis.", POSITIVE)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
