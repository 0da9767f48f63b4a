"""Keys of ``metrics.jsonl``. ``reference`` says what they mean. Times are in seconds."""

from __future__ import annotations

STEP = "trainer/step"
AVG_RAW_REWARD = "reward/avg_raw_reward"
# Number of responses that could not be scored.
NUM_FAILED = "reward/num_failed"
NUM_TURNS = "reward/num_turns"
EVAL_SCORE = "eval/all/avg_score"
THROUGHPUT = "vllm/train/generation_throughput_tok_s"
DRAFT_LOSS = "draft/loss"
DRAFT_TOP1 = "draft/top1_agreement"
PREDICTED_ACCEPTANCE_LENGTH = "draft/predicted_acceptance_length"
PREDICTED_DRAFTS = "draft/predicted_drafts"

# Decisions of trainer.draft.train: whether the step trained the draft, whether the engines got the result, and seconds
# per step that rollouts would lose with a draft left alone, and that training and sending it take.
DRAFT_TRAINED = "draft_training/trained"
DRAFT_PUBLISHED = "draft_training/published"
DRAFT_GAIN = "draft_training/gain_s"
DRAFT_COST = "draft_training/cost_s"

# With a schedule that changes the number of drafted tokens: share of steps with the drafter off, tokens per second of
# decode steps, and what step times promise: at the planned length, and how many times as many as without a draft.
DRAFTER_OFF = "speculation/drafter_off_share"
DECODE_THROUGHPUT = "speculation/decode_tok_s"
EXPECTED_THROUGHPUT = "speculation/expected_tok_s"
ESTIMATED_SPEEDUP = "speculation/estimated_speedup"
LENGTH_AT_BATCH = "speculation/drafted_at_batch_"

# With trainer.fully_async: training steps by which the policy is ahead of the weights that sampled its batch, and
# shares of a step in which workers and engines did not work.
STALENESS = "async/staleness_steps"
SPANS = "async/versions_per_response"
SPANNING = "async/spanning_share"
ACCEPTANCE_AFTER = "async/acceptance_length_after_updates_"
TRAINER_IDLE = "async/trainer_idle_share"
ENGINES_IDLE = "async/engines_idle_share"

# With dynamic sampling only: batches sampled for the step, and groups in them whose rewards differ.
NUM_SAMPLE_BATCHES = "reward/num_sample_batches"
NUM_KEPT_GROUPS = "reward/num_kept_groups"

# Of a mixture of experts: tokens of the busiest and of the idlest expert of a layer, as multiples of an even load.
EXPERT_LOAD_MAX = "policy/expert_load_max"
EXPERT_LOAD_MIN = "policy/expert_load_min"

LOGPROBS_DIFF = "policy/rollout_train_logprobs_abs_diff_mean"
LOGPROBS_DIFF_MAX = "policy/rollout_train_logprobs_abs_diff_max"
LOGPROBS_KL = "policy/rollout_train_kl"
ACCEPTANCE_GAP = "draft/predicted_minus_measured_acceptance_length"

# Steps with a sync canary have the first three, steps with a losslessness canary the last two.
CANARY_POLICY = "canary/policy_logprobs_abs_diff_mean"
CANARY_DRAFT = "canary/draft_logprobs_abs_diff_mean"
CANARY_FAVOURITES = "canary/draft_tokens_equal"
LOSSLESS_GREEDY = "canary/lossless_greedy_equal"
LOSSLESS_P_VALUE = "canary/lossless_p_value"

# Phases of a step, in order.
PHASES = ("generate", "fwd_logprobs", "policy_train", "draft_train", "sync_weights")
STEP_TIME = "timing/step"

POLICY_VERSION = "sync/policy_version"
DRAFT_VERSION = "sync/draft_version"
SYNC_BYTES = "sync/bytes"


def length_at_batch(batch_size: int) -> str:
    """Mean number of drafted tokens in steps of ``batch_size`` (a power of two) responses up to the next power."""
    return f"{LENGTH_AT_BATCH}{batch_size}"


def acceptance_after_updates(count: int) -> str:
    """Acceptance length of the tokens that were sampled after so many updates since their response began."""
    return f"{ACCEPTANCE_AFTER}{count}"


def pass_at(num_samples: int) -> str:
    """Share of prompts with a positive reward for at least one of ``num_samples`` responses."""
    return f"reward/avg_pass_at_{num_samples}"


def timing(phase: str) -> str:
    """Seconds of a phase of the step."""
    return f"timing/{phase}"


def scored_acceptance_length(copy: str) -> str:
    """Predicted acceptance length of the draft with other weights (``types.FROZEN`` and so on), on one micro-batch."""
    return f"draft_training/acceptance_length_{copy}"


def draft_top1_pos(position: int) -> str:
    """Share of tokens trained at draft position ``position`` (from 1) whose top token is the policy's, too."""
    return f"{DRAFT_TOP1}_pos_{position}"


def predicted_acceptance_pos(position: int) -> str:
    """Share of drafts that the trainer expects an engine to accept at least up to ``position`` (from 1)."""
    return f"draft/predicted_acceptance_rate_pos_{position}"


def acceptance_rate(mode: str) -> str:
    """Accepted tokens / drafted tokens. ``mode`` is "train" or "eval"."""
    return f"vllm/{mode}/draft_acceptance_rate"


def acceptance_length(mode: str) -> str:
    """Draft acceptance length: 1 + accepted tokens / drafts."""
    return f"vllm/{mode}/draft_mean_acceptance_length"


def acceptance_rate_pos(mode: str, position: int) -> str:
    """Share of drafts accepted at least up to ``position`` (from 1)."""
    return f"vllm/{mode}/draft_acceptance_rate_pos_{position}"
