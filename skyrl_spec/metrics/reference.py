"""What every metric means: the source of docs/reference/metrics.md, held against what runs write by a test."""

from __future__ import annotations

import re
from typing import NamedTuple

from skyrl_spec.metrics.headline import HEADLINES


class Described(NamedTuple):
    """``key`` may end in ``N`` (samples a prompt) or ``K`` (a position, from 1); ``{a,b}`` is either."""

    key: str
    unit: str
    meaning: str


REFERENCE = (
    Described("trainer/step", "", "Number of the step, from 1; 0 is the evaluation before the first."),
    Described("reward/avg_raw_reward", "", "Mean reward of all sampled responses, as the environments gave it."),
    Described("reward/avg_pass_at_N", "share", "Prompts of whose N responses at least one earned a reward."),
    Described("reward/num_failed", "responses", "Responses that could not be scored; they count with reward 0."),
    Described("reward/num_sample_batches", "batches", "Dynamic sampling: batches sampled for the step."),
    Described("reward/num_kept_groups", "groups", "Dynamic sampling: groups in them whose rewards differ."),
    Described("policy/policy_loss", "", "The clipped objective, averaged as trainer.algorithm.loss_reduction says."),
    Described("policy/grad_norm", "", "Norm of the policy's gradient before clipping; nothing of the draft is in it."),
    Described("policy/entropy", "nats", "Entropy of the policy's distribution, mean over trained tokens."),
    Described("policy/kl", "nats", "KL to the frozen reference, where trainer.algorithm.use_kl_loss is on."),
    Described("policy/clip_ratio", "share", "Tokens whose ratio was clipped."),
    Described("policy/lr", "", "Learning rate of the last update."),
    Described("policy/skipped_updates", "share", "Updates that were skipped because the gradient was not finite."),
    Described(
        "policy/rollout_train_logprobs_abs_diff_mean",
        "nats",
        "Mean |difference| of the engine's and the trainer's log-probs of the same sampled tokens. Rounding only: it "
        "rises when engines hold other weights or sample otherwise than the trainer assumes.",
    ),
    Described("policy/rollout_train_logprobs_abs_diff_max", "nats", "The largest of these differences."),
    Described(
        "policy/rollout_train_kl", "nats", "KL of the engine's to the trainer's distribution, estimated from them."
    ),
    Described(
        "draft/loss", "nats", "Cross-entropy of the draft against the policy; its floor is the policy's entropy."
    ),
    Described("draft/grad_norm", "", "Norm of the draft's gradient before clipping."),
    Described("draft/lr", "", "Learning rate of the draft's last update."),
    Described("draft/skipped_updates", "share", "Draft updates that were skipped; the policy's are counted apart."),
    Described("draft/top1_agreement", "share", "Drafted tokens at which the draft's favourite is the policy's too."),
    Described("draft/top1_agreement_pos_K", "share", "The same at draft position K."),
    Described(
        "draft/predicted_acceptance_length",
        "tokens",
        "What policy and draft make the trainer expect vLLM to measure as the mean acceptance length.",
    ),
    Described("draft/predicted_acceptance_rate_pos_K", "share", "Drafts expected to be accepted at least up to K."),
    Described(
        "draft/predicted_minus_measured_acceptance_length",
        "tokens",
        "Far from 0: the engines do not draft what the trainer trains. Beyond trainer.canary.max_acceptance_gap a "
        "warning says so.",
    ),
    Described("vllm/{train,eval}/draft_acceptance_rate", "share", "Accepted / drafted tokens."),
    Described(
        "vllm/{train,eval}/draft_mean_acceptance_length",
        "tokens",
        "1 + accepted / drafts: tokens that one forward pass of the policy yields. From summed counters.",
    ),
    Described("vllm/{train,eval}/draft_num_draft_tokens", "tokens", "Drafted tokens."),
    Described("vllm/{train,eval}/draft_num_accepted_tokens", "tokens", "Accepted ones of them."),
    Described("vllm/{train,eval}/draft_acceptance_rate_pos_K", "share", "Drafts accepted at least up to position K."),
    Described("vllm/train/generation_throughput_tok_s", "tokens/s", "Generated tokens over the time engines generate."),
    Described("timing/generate", "s", "Sampling and scoring."),
    Described("timing/fwd_logprobs", "s", "Log-probs of the rollouts before the update (and of the reference)."),
    Described("timing/policy_train", "s", "Forward, backward and update of the policy."),
    Described("timing/draft_train", "s", "Forward, backward and update of the draft, on captured states."),
    Described("timing/sync_weights", "s", "Policy, then draft, to all engines."),
    Described("timing/canary", "s", "Sync canary, in the steps that have one."),
    Described("timing/lossless", "s", "Losslessness canary, in the steps that have one."),
    Described("timing/step", "s", "The whole step, evaluation not included."),
    Described(
        "sync/policy_version", "", "Number of the last sync of the policy; what engines held is on each rollout."
    ),
    Described("sync/draft_version", "", "The same of the draft."),
    Described("sync/bytes", "bytes", "What a sync sends to an engine."),
    Described(
        "canary/policy_logprobs_abs_diff_mean", "nats", "Engine against trainer on fixed prompts; the worst engine."
    ),
    Described(
        "canary/draft_logprobs_abs_diff_mean", "nats", "The same of the draft's log-probs of its drafted tokens."
    ),
    Described("canary/draft_tokens_equal", "share", "Drafted tokens that the trainer's draft would have drafted too."),
    Described("canary/lossless_greedy_equal", "share", "Greedy responses that are equal with and without the draft."),
    Described(
        "canary/lossless_p_value", "", "Smallest corrected p-value of the two-sample tests; very small is alarm."
    ),
    Described("eval/all/avg_score", "", "Mean reward on the held-out prompts, as generator.eval_sampling_params says."),
    *(
        Described(f"headline/{entry.slug}_{{first,last}}", "", f"`{entry.key}` of the first and last step that has it.")
        for entry in HEADLINES
    ),
    Described("headline/steps", "", "Number of the last step."),
    Described("headline/mean_step_s", "s", "Mean of `timing/step`."),
    Described("headline/rollout_speedup", "", "Tokens/s with the draft over without, trainer.measure_speedup."),
)


def description(key: str) -> Described | None:
    """The entry that describes ``key`` of ``metrics.jsonl``."""
    return next((entry for entry in REFERENCE if re.fullmatch(_pattern(entry.key), key)), None)


def _pattern(key: str) -> str:
    escaped = re.sub(r"\\{(\w+),(\w+)\\}", r"(\1|\2)", re.escape(key))
    return re.sub(r"_(N|K)$", r"_\\d+", escaped)
