"""Meaning of every metric, the source of docs/reference/metrics.md. A test compares it with the keys of runs."""

from __future__ import annotations

import re
from typing import NamedTuple

from skyrl_spec.metrics.headline import HEADLINES


class Described(NamedTuple):
    """Description of a metric. In ``key``, N is samples per prompt, K a draft position from 1, B a power of two.

    ``{a,b,c}`` is a, b or c.
    """

    key: str
    unit: str
    meaning: str


REFERENCE = (
    Described("trainer/step", "", "Number of the training step, from 1. 0: the evaluation before the first step."),
    Described("reward/avg_raw_reward", "", "Mean reward of all sampled responses, before any penalty."),
    Described("reward/avg_pass_at_N", "share", "Prompts with a positive reward for at least one of N responses."),
    Described("reward/num_failed", "responses", "Responses that could not be scored. Their reward is 0."),
    Described("reward/num_turns", "turns", "Mean number of turns of a response, where environments take several."),
    Described("reward/num_sample_batches", "batches", "Dynamic sampling: batches sampled for the step."),
    Described("reward/num_kept_groups", "groups", "Dynamic sampling: sampled groups whose rewards differ."),
    Described(
        "async/staleness_steps",
        "steps",
        "trainer.fully_async: training steps by which the policy is ahead of the weights that sampled its batch.",
    ),
    Described(
        "async/versions_per_response",
        "",
        "trainer.fully_async.max_staleness_steps from 2: mean number of weights that sampled a response.",
    ),
    Described(
        "async/acceptance_length_after_updates_N",
        "tokens",
        "Acceptance length of tokens that were sampled after N updates since their response began.",
    ),
    Described("async/spanning_share", "share", "Responses that were sampled by more than one set of weights."),
    Described(
        "async/trainer_idle_share",
        "share",
        "Part of a step during which the workers did not train: they waited for the next batch, a sync or a canary.",
    ),
    Described(
        "async/engines_idle_share", "share", "Part of a step during which the engines did not sample the next batch."
    ),
    Described("policy/policy_loss", "", "Clipped policy objective, averaged by trainer.algorithm.loss_reduction."),
    Described("policy/grad_norm", "", "Norm of the policy's gradient before clipping. The draft has no part in it."),
    Described("policy/entropy", "nats", "Entropy of the policy's distribution, averaged over trained tokens."),
    Described("policy/kl", "nats", "KL(policy || initial policy), with trainer.algorithm.use_kl_loss only."),
    Described("policy/clip_ratio", "share", "Trained tokens whose loss is bounded by a clip."),
    Described("policy/lr", "", "Learning rate of the policy, averaged over the step's updates."),
    Described(
        "policy/skipped_updates", "share", "Policy updates that were skipped because the gradient was not finite."
    ),
    Described(
        "policy/expert_load_max",
        "",
        "Of a mixture of experts: tokens of the busiest expert of a layer in training, as a multiple of an even share. "
        "Mean over layers.",
    ),
    Described("policy/expert_load_min", "", "The same of the idlest expert of a layer. 0: it had none."),
    Described(
        "policy/rollout_train_logprobs_abs_diff_mean",
        "nats",
        "Mean |difference| between the engine's and the trainer's log-probs of the sampled tokens. Only rounding "
        "contributes, unless engines hold other weights or sample differently than the trainer assumes.",
    ),
    Described(
        "policy/rollout_train_logprobs_abs_diff_max",
        "nats",
        "Largest |difference| between these log-probs in the step.",
    ),
    Described(
        "policy/rollout_train_kl",
        "nats",
        "KL(engine || trainer), estimated from the same log-probs.",
    ),
    Described(
        "draft/loss",
        "nats",
        "The draft's loss, loss_type. With soft_ce, a cross-entropy, it cannot fall below the policy's entropy.",
    ),
    Described("draft/grad_norm", "", "Norm of the draft's gradient before clipping."),
    Described("draft/lr", "", "Learning rate of the draft, averaged over the step's updates."),
    Described("draft/skipped_updates", "share", "Draft updates that were skipped because the gradient was not finite."),
    Described(
        "draft/top1_agreement",
        "share",
        "Trained positions at which draft and policy have the same most probable token.",
    ),
    Described("draft/top1_agreement_pos_K", "share", "draft/top1_agreement at draft position K."),
    Described(
        "draft/predicted_acceptance_length",
        "tokens",
        "Draft acceptance length that the trainer expects vLLM to measure, computed from the distributions of policy "
        "and draft.",
    ),
    Described(
        "draft/predicted_drafts",
        "drafts",
        "Drafts in draft/predicted_acceptance_length, per optimizer step. Few of them make it inaccurate.",
    ),
    Described(
        "draft/predicted_acceptance_rate_pos_K",
        "share",
        "Drafts whose first K tokens the trainer expects to be accepted.",
    ),
    Described(
        "draft/predicted_minus_measured_acceptance_length",
        "tokens",
        "Predicted minus measured draft acceptance length. Far from 0, the engines do not draft as the trainer's draft "
        "does; trainer.canary.max_acceptance_gap sets when a warning is printed.",
    ),
    Described("draft_training/trained", "", "1 if the step trained the draft, else 0 (trainer.draft.train)."),
    Described(
        "draft_training/published",
        "",
        "1 if the engines got the draft that the step trained. 0: it was not trained, or got worse and was set back.",
    ),
    Described(
        "draft_training/gain_s",
        "s",
        "trainer.draft.train=auto: seconds per step that rollouts would lose with a draft left alone for some steps.",
    ),
    Described(
        "draft_training/cost_s",
        "s",
        "trainer.draft.train=auto: seconds per step that the draft's training and its part of the sync take.",
    ),
    Described(
        "draft_training/acceptance_length_{candidate,frozen,served,earlier}",
        "tokens",
        "draft/predicted_acceptance_length on one micro-batch: of the draft after the step's updates, of the draft of "
        "the start, and with trainer.draft.train=auto of the draft before the step and of the draft some steps ago.",
    ),
    Described("vllm/{train,eval}/draft_acceptance_rate", "share", "Accepted tokens / drafted tokens."),
    Described(
        "vllm/{train,eval}/draft_mean_acceptance_length",
        "tokens",
        "Draft acceptance length: 1 + accepted tokens / drafts, which is the mean number of tokens per forward pass of "
        "the policy.",
    ),
    Described("vllm/{train,eval}/draft_num_draft_tokens", "tokens", "Number of drafted tokens."),
    Described("vllm/{train,eval}/draft_num_accepted_tokens", "tokens", "Number of drafted tokens that were accepted."),
    Described(
        "vllm/{train,eval}/draft_acceptance_rate_pos_K",
        "share",
        "Drafts whose first K tokens were accepted, of those with at least K tokens. Missing if these are fewer than a "
        "quarter of all drafts.",
    ),
    Described(
        "vllm/train/generation_throughput_tok_s", "tokens/s", "Generated tokens / seconds in which engines generated."
    ),
    Described(
        "speculation/drafted_at_batch_B",
        "tokens",
        "With a schedule: mean number of drafted tokens in steps with B responses or more, and fewer than 2 B.",
    ),
    Described("speculation/drafter_off_share", "share", "With a schedule: steps in which the drafter does not run."),
    Described(
        "speculation/decode_tok_s",
        "tokens/s",
        "With a schedule: tokens per second of an engine in steps without prompts.",
    ),
    Described(
        "speculation/expected_tok_s",
        "tokens/s",
        "schedule=auto: what the engine's step times and acceptance promise for these steps.",
    ),
    Described(
        "speculation/estimated_speedup",
        "",
        "schedule=auto: tokens of these steps / tokens that they would have given in the same time without a draft, by "
        "step times.",
    ),
    Described("timing/generate", "s", "Sampling and scoring of responses."),
    Described(
        "timing/fwd_logprobs", "s", "Log-probs of the rollouts before the update, also under a reference policy."
    ),
    Described("timing/policy_train", "s", "Forward, backward and update of the policy."),
    Described("timing/draft_train", "s", "Forward, backward and update of the draft."),
    Described("timing/sync_weights", "s", "Transfer of policy and draft to all engines."),
    Described(
        "timing/moves",
        "s",
        "Moves between devices and host memory: offload by the workers, sleep and waking of engines. Where settings "
        "move something.",
    ),
    Described("timing/canary", "s", "Sync canary, in steps that have one."),
    Described("timing/lossless", "s", "Losslessness canary, in steps that have one."),
    Described("timing/step", "s", "Whole step, without evaluation."),
    Described("sync/policy_version", "", "Number of the last weight sync of the policy. 0: the weights of the start."),
    Described("sync/draft_version", "", "Number of the last weight sync of the draft. 0: the weights of the start."),
    Described("sync/bytes", "bytes", "Bytes that a weight sync sends to an engine."),
    Described(
        "canary/policy_logprobs_abs_diff_mean",
        "nats",
        "Mean |difference| between the engine's and the trainer's log-probs on fixed prompts, for the worst engine.",
    ),
    Described(
        "canary/draft_logprobs_abs_diff_mean",
        "nats",
        "Mean |difference| between the engine's and the trainer's draft log-probs of the tokens that the engine "
        "drafted on fixed prompts, for the worst engine.",
    ),
    Described(
        "canary/draft_tokens_equal",
        "share",
        "Tokens drafted on fixed prompts that the trainer's draft would draft, too.",
    ),
    Described("canary/lossless_greedy_equal", "share", "Greedy responses that are equal with and without the draft."),
    Described(
        "canary/lossless_p_value",
        "",
        "Smallest corrected p-value of tests that compare responses with and without the draft. Below "
        "trainer.canary.lossless_level the canary fails.",
    ),
    Described("eval/all/avg_score", "", "Mean reward on the held-out prompts."),
    *(
        Described(f"headline/{entry.slug}_{{first,last}}", "", f"`{entry.key}` of the first and last step that has it.")
        for entry in HEADLINES
    ),
    Described("headline/steps", "", "Number of the last step."),
    Described("headline/mean_step_s", "s", "Mean of `timing/step`."),
    Described(
        "headline/rollout_speedup",
        "",
        "Tokens/s with the draft / tokens/s without, measured at the end of a run (trainer.measure_speedup).",
    ),
)


def description(key: str) -> Described | None:
    """The entry that describes ``key``. None if there is none."""
    return next((entry for entry in REFERENCE if re.fullmatch(_pattern(entry.key), key)), None)


def _pattern(key: str) -> str:
    escaped = re.sub(r"\\{([\w,]+)\\}", lambda match: f"({match[1].replace(',', '|')})", re.escape(key))
    return re.sub(r"_(N|K|B)$", r"_\\d+", escaped)
