"""What travels between the parts of a step. Plain data: numpy and Python, no torch, so that Ray moves it cheaply."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

# The two sets of weights that are trained and synced.
Component = Literal["policy", "draft"]


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset, tokenized. ``uid`` is unique within its dataset."""

    uid: str
    token_ids: list[int]
    messages: list[dict[str, str]]
    env_class: str
    extras: dict[str, Any]


@dataclass(frozen=True)
class Versions:
    """Which weights an engine held: the number of the last sync of each; 0 is what it loaded."""

    policy: int = 0
    draft: int = 0

    def __str__(self) -> str:
        return f"policy version {self.policy} and draft version {self.draft}"


@dataclass(frozen=True)
class Generation:
    """One sampled response. ``logprobs`` are of the distribution sampled from (temperature included)."""

    token_ids: list[int]
    logprobs: list[float]
    # "stop" (end token) or "length".
    finish_reason: str
    versions: Versions


@dataclass(frozen=True)
class Proposals:
    """One sampled response, and what an engine's draft proposed along it: A blocks of K tokens.

    A block proposes tokens ``anchor + 1 ... anchor + K``, knowing those up to ``anchor``. ``draft_logprobs`` are the
    draft's own, at temperature 1. There are no blocks without a draft.
    """

    prompt_ids: list[int]
    generation: Generation
    anchors: list[int]
    drafted: list[list[int]]
    draft_logprobs: list[list[float]]

    def accepted(self) -> list[bool]:
        """Of each response token, whether it is a drafted one that was accepted."""
        response, accepted = self.generation.token_ids, [False] * len(self.generation.token_ids)
        for anchor, block in zip(self.anchors, self.drafted, strict=True):
            for index, token in enumerate(block, start=anchor - len(self.prompt_ids) + 1):
                if index >= len(response) or response[index] != token:
                    break
                accepted[index] = True
        return accepted


@dataclass(frozen=True)
class ProposalScores:
    """What the trainer makes of ``Proposals``, all of them one after the other.

    ``policy_logprobs`` of the sampled tokens, at the sampling temperature; of the drafted tokens ``draft_logprobs``, at
    temperature 1, and ``favourites``, what the trainer's draft would have drafted in their place.
    """

    policy_logprobs: np.ndarray  # [T] float32
    draft_logprobs: np.ndarray  # [A, K] float32
    favourites: np.ndarray  # [A, K] int64


@dataclass(frozen=True)
class Rollout:
    """A prompt, one response and its reward. ``loss_mask`` has an entry a response token (1: trained on).

    ``error``: why the response could not be scored; it counts as failed, with reward 0.
    """

    prompt: Prompt
    generation: Generation
    text: str
    reward: float
    loss_mask: list[int]
    error: str | None = None


@dataclass(frozen=True)
class DraftedResponse:
    """The beginning of a response, to look at: each token's text, and whether it was drafted and accepted."""

    prompt: Prompt
    generation: Generation
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class SpecCounters:
    """Speculative decoding since an engine started (or between two readings: ``later - earlier``)."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # Accepted at draft position 1, 2, ...
    num_accepted_tokens_per_pos: tuple[int, ...] = ()

    def __add__(self, other: SpecCounters) -> SpecCounters:
        return self._combine(other, 1)

    def __sub__(self, other: SpecCounters) -> SpecCounters:
        return self._combine(other, -1)

    def _combine(self, other: SpecCounters, sign: int) -> SpecCounters:
        width = max(len(self.num_accepted_tokens_per_pos), len(other.num_accepted_tokens_per_pos))
        mine, theirs = (
            list(c.num_accepted_tokens_per_pos) + [0] * (width - len(c.num_accepted_tokens_per_pos))
            for c in (self, other)
        )
        return SpecCounters(
            self.num_drafts + sign * other.num_drafts,
            self.num_draft_tokens + sign * other.num_draft_tokens,
            self.num_accepted_tokens + sign * other.num_accepted_tokens,
            tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)),
        )

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / drafts: tokens a target forward yields. 1.0 without drafts."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0


@dataclass
class TrainBatch:
    """Sequences padded on the right, as the workers receive them. Shapes: B sequences, S positions.

    Every per-token array is indexed by the token itself: entry ``[b, s]`` belongs to ``token_ids[b, s]``, so
    ``rollout_logprobs[b, s]`` is the log-prob of that token given those before it. ``loss_weights`` carry the one
    global denominator: a loss is ``sum(loss_weights * token_loss)`` over all ranks and micro-batches, and they are 0
    wherever no loss is taken. ``segment_ids`` number the documents of a row from 1; 0 is padding.
    """

    token_ids: np.ndarray  # [B, S] int64
    segment_ids: np.ndarray  # [B, S] int64
    loss_mask: np.ndarray  # [B, S] bool: response tokens that are trained on
    loss_weights: np.ndarray  # [B, S] float32
    advantages: np.ndarray  # [B, S] float32
    rollout_logprobs: np.ndarray  # [B, S] float32
    policy_logprobs: np.ndarray | None = None  # [B, S] float32, before this batch's updates
    ref_logprobs: np.ndarray | None = None  # [B, S] float32, of the frozen reference

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, rows: np.ndarray | slice) -> TrainBatch:
        """The given rows, columns cut to the longest of them."""
        width = int((self.segment_ids[rows] > 0).sum(axis=1).max(initial=1))
        cut = {name: value[rows, :width] for name, value in self.__dict__.items() if value is not None}
        return replace(self, **cut)


@dataclass
class Metric:
    """A sum and a count, divided once, when it is written."""

    total: float = 0.0
    count: float = 0.0

    def add(self, total: float, count: float = 1.0) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


Metrics = dict[str, Metric]


@dataclass
class StepReport:
    """What a worker tells of one optimizer step: sums and counts, already reduced over all ranks."""

    metrics: Metrics = field(default_factory=dict)
    policy_train_s: float = 0.0
    draft_train_s: float = 0.0
