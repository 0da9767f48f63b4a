"""Keys of ``metrics.jsonl`` that a run of a given kind must have. Used by the tests of unit/ and e2e/."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_spec.metrics import names
from skyrl_spec.types import CANDIDATE, EARLIER, FROZEN, SERVED


def step_keys(
    *, num_trained_positions: int, num_speculative_tokens: int, n_samples_per_prompt: int, use_kl_loss: bool
) -> list[str]:
    """Keys of every training step.

    ``num_trained_positions``: positions that the draft is trained at, 0 without a trained draft.
    ``num_speculative_tokens``: tokens that the engines draft at a time, 0 without a draft.
    """
    trains_draft = num_trained_positions > 0
    phases = [phase for phase in names.PHASES if trains_draft or phase != "draft_train"]
    return [
        names.STEP,
        names.AVG_RAW_REWARD,
        names.pass_at(n_samples_per_prompt),
        names.NUM_FAILED,
        *(f"policy/{name}" for name in ("policy_loss", "entropy", "clip_ratio", "grad_norm", "lr", "skipped_updates")),
        names.LOGPROBS_DIFF,
        names.LOGPROBS_DIFF_MAX,
        names.LOGPROBS_KL,
        *(["policy/kl"] if use_kl_loss else []),
        *(draft_keys(num_trained_positions) if trains_draft else []),
        *(map(names.scored_acceptance_length, (CANDIDATE, FROZEN)) if trains_draft else []),
        *([names.DRAFT_TRAINED, names.DRAFT_PUBLISHED] if trains_draft else []),
        *speculation_keys("train", num_speculative_tokens),
        *([names.ACCEPTANCE_GAP] if trains_draft and num_speculative_tokens else []),
        names.THROUGHPUT,
        *map(names.timing, phases),
        names.STEP_TIME,
        names.POLICY_VERSION,
        *([names.DRAFT_VERSION] if trains_draft else []),
        names.SYNC_BYTES,
    ]


def draft_keys(num_trained_positions: int) -> list[str]:
    """Keys of the training of a draft."""
    by_position = (names.draft_top1_pos, names.predicted_acceptance_pos)
    return [
        names.DRAFT_LOSS,
        *(f"draft/{name}" for name in ("grad_norm", "lr", "skipped_updates")),
        names.DRAFT_TOP1,
        names.PREDICTED_ACCEPTANCE_LENGTH,
        names.PREDICTED_DRAFTS,
        *(key(position) for position in range(1, num_trained_positions + 1) for key in by_position),
    ]


def speculation_keys(mode: str, num_speculative_tokens: int) -> list[str]:
    """Keys that engines with a draft add. ``mode`` is "train" or "eval"."""
    if num_speculative_tokens == 0:
        return []
    counts = [f"vllm/{mode}/draft_num_{name}_tokens" for name in ("draft", "accepted")]
    positions = [names.acceptance_rate_pos(mode, position) for position in range(1, num_speculative_tokens + 1)]
    return [names.acceptance_rate(mode), names.acceptance_length(mode), *counts, *positions]


def schedule_keys(batch_sizes: Sequence[int], *, is_auto: bool) -> list[str]:
    """Keys that a schedule of draft lengths adds, if a step has decode steps with these batch sizes."""
    promised = [names.EXPECTED_THROUGHPUT, names.ESTIMATED_SPEEDUP] if is_auto else []
    return [*map(names.length_at_batch, batch_sizes), names.DRAFTER_OFF, names.DECODE_THROUGHPUT, *promised]


def auto_training_keys() -> list[str]:
    """Keys that trainer.draft.train=auto adds to a step that trains the draft, the first of a window excepted."""
    return [names.DRAFT_GAIN, names.DRAFT_COST, *map(names.scored_acceptance_length, (SERVED, EARLIER))]


def canary_keys(*, has_draft: bool) -> list[str]:
    """Keys that a sync canary adds."""
    draft = [names.CANARY_DRAFT, names.CANARY_FAVOURITES] if has_draft else []
    return [names.CANARY_POLICY, *draft, names.timing("canary")]


def lossless_keys() -> list[str]:
    """Keys that a losslessness canary adds."""
    return [names.LOSSLESS_GREEDY, names.LOSSLESS_P_VALUE, names.timing("lossless")]


def eval_keys(num_speculative_tokens: int) -> list[str]:
    """Keys that an evaluation adds."""
    return [names.EVAL_SCORE, *speculation_keys("eval", num_speculative_tokens)]
