"""The keys of ``metrics.jsonl``, and which of them a run has. Times are in seconds."""

from __future__ import annotations

STEP = "trainer/step"
AVG_RAW_REWARD = "reward/avg_raw_reward"
# Responses that no environment could score.
NUM_FAILED = "reward/num_failed"
EVAL_SCORE = "eval/all/avg_score"
THROUGHPUT = "vllm/train/generation_throughput_tok_s"
DRAFT_LOSS = "draft/loss"
DRAFT_TOP1 = "draft/top1_agreement"
PREDICTED_ACCEPTANCE_LENGTH = "draft/predicted_acceptance_length"

# With dynamic sampling alone: batches sampled for the step, and groups in them whose rewards differ.
NUM_SAMPLE_BATCHES = "reward/num_sample_batches"
NUM_KEPT_GROUPS = "reward/num_kept_groups"

POLICY = tuple(
    f"policy/{name}" for name in ("policy_loss", "grad_norm", "entropy", "clip_ratio", "lr", "skipped_updates")
)
POLICY_KL = "policy/kl"
LOGPROBS_DIFF = "policy/rollout_train_logprobs_abs_diff_mean"
LOGPROBS_DIFF_MAX = "policy/rollout_train_logprobs_abs_diff_max"
LOGPROBS_KL = "policy/rollout_train_kl"
LOGPROBS = (LOGPROBS_DIFF, LOGPROBS_DIFF_MAX, LOGPROBS_KL)
ACCEPTANCE_GAP = "draft/predicted_minus_measured_acceptance_length"
DRAFT = (DRAFT_LOSS, "draft/grad_norm", "draft/lr", "draft/skipped_updates", DRAFT_TOP1, PREDICTED_ACCEPTANCE_LENGTH)

# Of the steps whose sync was checked, and of those that were checked for losslessness.
CANARY_POLICY = "canary/policy_logprobs_abs_diff_mean"
CANARY_DRAFT = "canary/draft_logprobs_abs_diff_mean"
CANARY_FAVOURITES = "canary/draft_tokens_equal"
LOSSLESS_GREEDY = "canary/lossless_greedy_equal"
LOSSLESS_P_VALUE = "canary/lossless_p_value"

# In the order of a step.
PHASES = ("generate", "fwd_logprobs", "policy_train", "draft_train", "sync_weights")
STEP_TIME = "timing/step"

POLICY_VERSION = "sync/policy_version"
DRAFT_VERSION = "sync/draft_version"
SYNC_BYTES = "sync/bytes"


def pass_at(num_samples: int) -> str:
    """Share of prompts of whose ``num_samples`` responses at least one earned a reward."""
    return f"reward/avg_pass_at_{num_samples}"


def timing(phase: str) -> str:
    return f"timing/{phase}"


def draft_top1_pos(position: int) -> str:
    """Share of drafted tokens at ``position`` (from 1) whose favourite is the policy's too, in training."""
    return f"{DRAFT_TOP1}_pos_{position}"


def predicted_acceptance_pos(position: int) -> str:
    """Share of drafts that an engine is expected to accept at least up to ``position``, by draft and policy."""
    return f"draft/predicted_acceptance_rate_pos_{position}"


def acceptance_rate(mode: str) -> str:
    """Accepted / drafted tokens; ``mode`` is "train" or "eval"."""
    return f"vllm/{mode}/draft_acceptance_rate"


def acceptance_length(mode: str) -> str:
    """1 + accepted tokens / drafts."""
    return f"vllm/{mode}/draft_mean_acceptance_length"


def acceptance_rate_pos(mode: str, position: int) -> str:
    """Share of drafts accepted at least up to ``position``, counted from 1."""
    return f"vllm/{mode}/draft_acceptance_rate_pos_{position}"


def speculation_keys(mode: str, num_speculative_tokens: int) -> list[str]:
    """What engines with a draft tell; nothing for 0 tokens."""
    if num_speculative_tokens == 0:
        return []
    counts = [f"vllm/{mode}/draft_num_{name}_tokens" for name in ("draft", "accepted")]
    positions = [acceptance_rate_pos(mode, position) for position in range(1, num_speculative_tokens + 1)]
    return [acceptance_rate(mode), acceptance_length(mode), *counts, *positions]


def step_keys(
    *, num_trained_positions: int, num_speculative_tokens: int, n_samples_per_prompt: int, use_kl_loss: bool
) -> list[str]:
    """The keys of every training step of such a run.

    ``num_trained_positions``: drafted tokens of a chain that the draft is trained at, 0 without one;
    ``num_speculative_tokens``: what the engines draft, 0 if they have no draft.
    """
    trains_draft, trained_positions = num_trained_positions > 0, range(1, num_trained_positions + 1)
    phases = [phase for phase in PHASES if trains_draft or phase != "draft_train"]
    return [
        STEP,
        AVG_RAW_REWARD,
        pass_at(n_samples_per_prompt),
        NUM_FAILED,
        *POLICY,
        *LOGPROBS,
        *([POLICY_KL] if use_kl_loss else []),
        *(DRAFT if trains_draft else []),
        *(key(position) for position in trained_positions for key in (draft_top1_pos, predicted_acceptance_pos)),
        *speculation_keys("train", num_speculative_tokens),
        *([ACCEPTANCE_GAP] if trains_draft and num_speculative_tokens else []),
        THROUGHPUT,
        *map(timing, phases),
        STEP_TIME,
        POLICY_VERSION,
        *([DRAFT_VERSION] if trains_draft else []),
        SYNC_BYTES,
    ]


def canary_keys(*, has_draft: bool) -> list[str]:
    """What a step whose sync was checked has besides."""
    return [CANARY_POLICY, *([CANARY_DRAFT, CANARY_FAVOURITES] if has_draft else []), timing("canary")]


def lossless_keys() -> list[str]:
    """What a step that was checked for losslessness has besides."""
    return [LOSSLESS_GREEDY, LOSSLESS_P_VALUE, timing("lossless")]


def eval_keys(num_speculative_tokens: int) -> list[str]:
    """What a step with an evaluation has besides."""
    return [EVAL_SCORE, *speculation_keys("eval", num_speculative_tokens)]
