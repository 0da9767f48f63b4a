"""Plain data that the parts of a step exchange: numpy and Python objects, no torch, so that Ray moves it cheaply."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

# The two sets of weights that can be trained and synced.
Component = Literal["policy", "draft"]

# Weights of a draft at several moments: now, at the last sync, some training steps ago, and when the run began.
CANDIDATE, SERVED, EARLIER, FROZEN = "candidate", "served", "earlier", "frozen"


# A message of a conversation: role and content.
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A tokenized row of a dataset. ``uid`` is unique within the dataset; ``extras`` is what the environment reads."""

    uid: str
    token_ids: list[int]
    messages: list[Message]
    env_class: str
    extras: dict[str, Any]


@dataclass(frozen=True)
class Versions:
    """Weights that an engine holds: the number of the last sync of policy and draft. 0: the weights it loaded."""

    policy: int = 0
    draft: int = 0

    def __str__(self) -> str:
        return f"policy version {self.policy} and draft version {self.draft}"

    @property
    def label(self) -> str:
        """A word that ``of_label`` reads."""
        return f"{self.policy}.{self.draft}"

    @classmethod
    def of_label(cls, label: str) -> Versions:
        policy, draft = label.split(".")
        return cls(int(policy), int(draft))


@dataclass(frozen=True)
class Generation:
    """A sampled response. ``logprobs`` are those of the distribution it was sampled from, temperature included."""

    token_ids: list[int]
    logprobs: list[float]
    # "stop" (an end token was sampled) or "length".
    finish_reason: str
    # Weights that sampled its first token.
    versions: Versions
    # Weights that came while it was sampled, each with the index of the first token that they sampled.
    updates: tuple[tuple[int, Versions], ...] = ()
    # Steps of the engine that sampled it, with each of these weights.
    num_steps: tuple[int, ...] = ()
    # Experts that the engine sent the prompt's and the response's tokens to, without the last one: ``[tokens, L, k]``.
    experts: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SampleRequest:
    """A response that an engine shall sample while others run. ``key``: the caller's name of it."""

    key: int
    token_ids: list[int]
    # Of its random stream, on CPU.
    seed: int


@dataclass(frozen=True)
class Proposals:
    """A sampled response and the draft's proposals for it: A blocks of K tokens. No blocks without a draft.

    A block proposes the tokens at positions ``anchor + 1 ... anchor + K``, given the tokens up to ``anchor``.
    ``draft_logprobs`` are the draft's log-probs of its drafted tokens at temperature 1.
    """

    prompt_ids: list[int]
    generation: Generation
    anchors: list[int]
    drafted: list[list[int]]
    draft_logprobs: list[list[float]]

    def accepted(self) -> list[bool]:
        """For each response token, whether it was drafted and accepted."""
        response, accepted = self.generation.token_ids, [False] * len(self.generation.token_ids)
        for anchor, block in zip(self.anchors, self.drafted, strict=True):
            for index, token in enumerate(block, start=anchor - len(self.prompt_ids) + 1):
                if index >= len(response) or response[index] != token:
                    break
                accepted[index] = True
        return accepted


@dataclass(frozen=True)
class ProposalScores:
    """The trainer's scores of several ``Proposals``, concatenated.

    ``policy_logprobs``: the policy's log-probs of the sampled tokens, at the sampling temperature. ``draft_logprobs``:
    the draft's log-probs of the drafted tokens, at temperature 1. ``favourites``: the tokens that the trainer's draft
    would have drafted at the same positions.
    """

    policy_logprobs: np.ndarray  # [T] float32
    draft_logprobs: np.ndarray  # [A, K] float32
    favourites: np.ndarray  # [A, K] int64


@dataclass(frozen=True)
class Rollout:
    """A prompt, one response and its reward. ``loss_mask`` has one entry per response token; 1 means trained on.

    A response of several turns has the environment's answers between them, as tokens that nobody sampled. Their
    log-probs are 0, and they are not trained on. ``error`` says why the response could not be scored. Such a response
    counts as failed and has reward 0.
    """

    prompt: Prompt
    generation: Generation
    text: str
    reward: float
    loss_mask: list[int]
    error: str | None = None
    # Texts of the policy's turns, and of the environment's answers between them. One where there is one turn.
    turns: tuple[str, ...] = ("",)

    @property
    def num_turns(self) -> int:
        """Turns of the policy."""
        return (len(self.turns) + 1) // 2


@dataclass(frozen=True)
class DraftedResponse:
    """The beginning of a response for people to read: each token's text, and whether it was drafted and accepted."""

    prompt: Prompt
    generation: Generation
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class SpecCounters:
    """Counts of speculative decoding since an engine started, or between two readings (``later - earlier``)."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # Tokens accepted at draft position 1, 2, ...
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    # Drafts with at least 1, 2, ... tokens. Empty: all drafts are equally long.
    num_drafts_per_pos: tuple[int, ...] = ()

    def __add__(self, other: SpecCounters) -> SpecCounters:
        return self._combine(other, 1)

    def __sub__(self, other: SpecCounters) -> SpecCounters:
        return self._combine(other, -1)

    def _combine(self, other: SpecCounters, sign: int) -> SpecCounters:
        return SpecCounters(
            self.num_drafts + sign * other.num_drafts,
            self.num_draft_tokens + sign * other.num_draft_tokens,
            self.num_accepted_tokens + sign * other.num_accepted_tokens,
            _add(self.num_accepted_tokens_per_pos, other.num_accepted_tokens_per_pos, sign),
            _add(self.num_drafts_per_pos, other.num_drafts_per_pos, sign),
        )

    @property
    def drafts_per_pos(self) -> tuple[int, ...]:
        """Drafts with at least 1, 2, ... tokens."""
        return self.num_drafts_per_pos or (self.num_drafts,) * len(self.num_accepted_tokens_per_pos)

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted tokens / drafts: tokens per forward pass of the target. 1.0 without drafts."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0


def _add(first: tuple[int, ...], second: tuple[int, ...], sign: int) -> tuple[int, ...]:
    pairs = zip_longest(first, second, fillvalue=0)
    return tuple(one + sign * other for one, other in pairs)


# Batch sizes, and seconds of a step at each for each length that a scheduler tries.
StepTable = tuple[list[int], list[list[float]]]


@dataclass(frozen=True)
class LengthLog:
    """Steps of an engine by batch size, in bins from one power of two to the next, and by drafted tokens.

    ``expected_tokens`` and ``plain_tokens`` are the tokens that step times promised in the same seconds, at the planned
    length and without a draft. They are nan where no step times are known.
    """

    steps: list[list[int]]  # [bins, 2 + most]: drafter off, 0, 1, ... drafted tokens
    seconds: list[float]  # [bins]
    tokens: list[float]  # [bins]
    expected_tokens: list[float]  # [bins]
    plain_tokens: list[float]  # [bins]


@dataclass
class TrainBatch:
    """Documents padded on the right, as the workers receive them. Shapes: B documents, S positions.

    Entry ``[b, s]`` of every array belongs to the token ``token_ids[b, s]``: ``rollout_logprobs[b, s]`` is the log-prob
    of that token given the tokens before it. ``loss_weights`` contain the global denominator, so that a loss is
    ``sum(loss_weights * token_loss)`` over all ranks and micro-batches. They are 0 for tokens without a loss.
    """

    token_ids: np.ndarray  # [B, S] int64
    lengths: np.ndarray  # [B] int64, tokens of each document
    loss_mask: np.ndarray  # [B, S] bool, response tokens that are trained on
    loss_weights: np.ndarray  # [B, S] float32
    advantages: np.ndarray  # [B, S] float32
    rollout_logprobs: np.ndarray  # [B, S] float32
    # [B, S] float32, before this batch's updates. None: those of the update's own forward pass, so that the ratio is 1.
    policy_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None  # [B, S] float32, of the frozen reference
    # Of each document, the experts of its first tokens (``Generation.experts``), or None.
    experts: tuple[np.ndarray | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, rows: np.ndarray | slice) -> TrainBatch:
        """The given rows, cut to the length of the longest."""
        width = int(self.lengths[rows].max(initial=1))
        arrays = {name: value for name, value in self.__dict__.items() if isinstance(value, np.ndarray)}
        chosen: dict[str, Any] = {
            name: value[rows][:, :width] if value.ndim > 1 else value[rows] for name, value in arrays.items()
        }
        if self.experts is not None:
            chosen["experts"] = tuple(self.experts[row] for row in np.arange(len(self))[rows])
        return replace(self, **chosen)


@dataclass
class Metric:
    """A sum and a count. They are divided once, when the metric is written."""

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
    """Metrics and times of one optimizer step, already reduced over all ranks."""

    metrics: Metrics = field(default_factory=dict)
    policy_train_s: float = 0.0
    draft_train_s: float = 0.0
    # Log-probs before the step if the batch came without them: [rows of the shard, S] of a rank, [B, S] of all.
    policy_logprobs: np.ndarray | None = None
