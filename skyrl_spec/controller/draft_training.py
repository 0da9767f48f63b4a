"""Which training steps train the draft, and whether the engines get the result: ``trainer.draft.train``.

``auto`` compares, per training step, the seconds that rollouts would lose with a draft left alone with the seconds that
its training and its part of the sync take:

    loss = generate seconds x (acceptance length of the draft / that of the same draft some steps ago - 1)

Both lengths are predicted on the same responses (``training.copies``). It trains in windows of ``WINDOW`` steps. The
loss grows with the age of the copy, which is the draft at the window's beginning. What a draft learns now still counts
many steps later, so a line through the origin gives the loss of a draft left alone for ``HORIZON`` steps. If that is
above the cost, the window paid. It is then followed by the next, otherwise by a rest. A rest ends after some steps,
twice as many each time that a window did not pay, or as soon as the draft has become so much worse that a window would
pay if it brought that back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skyrl_spec.metrics import names
from skyrl_spec.settings.derived import training_interval
from skyrl_spec.types import CANDIDATE, EARLIER, FROZEN, SERVED

# Training steps of a window, steps for which what is learned in one counts, and the longest rest between windows.
WINDOW, HORIZON, LONGEST_REST = 6, 24, 48

# Tokens for which acceptance lengths are compared between steps that draft unlike numbers of tokens.
_COMPARED_TOKENS = 3
# Predicted acceptance lengths below this share of the served draft's are not noise of one micro-batch.
_WORSE = 0.98


@dataclass(frozen=True)
class Plan:
    """Plan of a training step: whether it trains the draft, and which copies of the draft it keeps and scores."""

    train: bool
    # Copies of the draft to score.
    scored: tuple[str, ...] = ()
    # Names under which to keep the draft as it is before the step.
    kept: tuple[str, ...] = ()


class DraftTraining:
    """A training step in every ``interval``, counted from the first. None: no step."""

    def __init__(self, interval: int | None):
        self._interval = interval

    def plan(self, steps_done: int) -> Plan:
        """The plan of the next step, after ``steps_done`` steps that trained the policy."""
        due = self._interval is not None and steps_done % self._interval == 0
        return Plan(due, (CANDIDATE, FROZEN) if due else ())

    def must_undo(self, values: Mapping[str, float]) -> bool:
        """Whether the draft that was just trained, with these metrics, is set back to the served one."""
        return False

    def observe(self, plan: Plan, values: Mapping[str, float], generate_s: float, cost_s: float) -> dict[str, float]:
        """Learns from a finished step; returns metrics.

        Args:
            generate_s: seconds of the step's rollouts.
            cost_s: seconds of the draft's training, and of its part of the sync.
        """
        return {names.DRAFT_TRAINED: float(plan.train)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``."""


@dataclass
class _Window:
    """Steps of a window: age of the earlier copy, seconds per step that the rollouts would lose with it, and cost."""

    ages: list[float] = field(default_factory=list)
    losses_s: list[float] = field(default_factory=list)
    costs_s: list[float] = field(default_factory=list)

    def gain_s(self) -> float:
        """Seconds per step that rollouts would lose with a draft left alone for ``HORIZON`` steps."""
        squares = sum(age * age for age in self.ages)
        product = sum(age * loss for age, loss in zip(self.ages, self.losses_s, strict=True))
        return HORIZON * product / squares if squares else 0.0

    def cost_s(self) -> float:
        return sum(self.costs_s) / len(self.costs_s)


class AutoDraftTraining(DraftTraining):
    """Trains in windows while that pays, and rests otherwise. See the head of this file."""

    def __init__(self) -> None:
        super().__init__(1)
        self._window = _Window()
        # Steps of the rest that are left. 0: training.
        self._rest_left = 0
        self._rest = WINDOW
        # For the end of a rest: cost of a step in the last window, and the best acceptance length (``_length``) since.
        self._cost_s, self._best_length = 0.0, 1.0

    def plan(self, steps_done: int) -> Plan:
        if self._rest_left:
            return Plan(False)
        begins = not self._window.costs_s
        scored = (CANDIDATE, SERVED, FROZEN) if begins else (CANDIDATE, SERVED, EARLIER, FROZEN)
        return Plan(True, scored, (SERVED, EARLIER) if begins else (SERVED,))

    def must_undo(self, values: Mapping[str, float]) -> bool:
        candidate, served = (values.get(names.scored_acceptance_length(copy)) for copy in (CANDIDATE, SERVED))
        # Nothing is scored where no draft is followed to its end: nan, or no value.
        return candidate is not None and served is not None and candidate < _WORSE * served

    def observe(self, plan: Plan, values: Mapping[str, float], generate_s: float, cost_s: float) -> dict[str, float]:
        length = _length(values)
        metrics = super().observe(plan, values, generate_s, cost_s)
        if not plan.train:
            self._best_length = float(np.fmax(self._best_length, length))
            lost_s = generate_s * (self._best_length / length - 1)
            # A window brings it back for the horizon.
            self._rest_left = 0 if lost_s * HORIZON > self._cost_s * WINDOW else self._rest_left - 1
            return metrics
        window = self._window
        if EARLIER in plan.scored:
            served, earlier = (values[names.scored_acceptance_length(copy)] for copy in (SERVED, EARLIER))
            # Not a number where no draft could be followed.
            if math.isfinite(served) and math.isfinite(earlier):
                window.ages.append(len(window.costs_s))
                window.losses_s.append(generate_s * (served / earlier - 1))
        window.costs_s.append(cost_s)
        metrics |= {names.DRAFT_GAIN: window.gain_s(), names.DRAFT_COST: window.cost_s()}
        if len(window.costs_s) > WINDOW:
            self._end_window(length)
        return metrics

    def _end_window(self, length: float) -> None:
        window, self._window = self._window, _Window()
        if window.gain_s() > window.cost_s():
            self._rest = WINDOW
            return
        self._rest_left, self._cost_s, self._best_length = self._rest, window.cost_s(), length
        self._rest = min(2 * self._rest, LONGEST_REST)

    def state_dict(self) -> dict[str, Any]:
        """The rest. A window begins anew, because copies of the draft are not saved."""
        return {
            "rest_left": self._rest_left,
            "rest": self._rest,
            "cost_s": self._cost_s,
            "best_length": self._best_length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self._rest_left, self._rest = state["rest_left"], state["rest"]
        self._cost_s, self._best_length = state["cost_s"], state["best_length"]


def _length(values: Mapping[str, float]) -> float:
    """Acceptance length as if all tokens were accepted like the first, which does not depend on how many are drafted.

    nan: nothing was drafted.
    """
    rate = values.get(names.acceptance_rate_pos("train", 1), math.nan)
    return float(sum(rate**index for index in range(_COMPARED_TOKENS + 1)))


def build_draft_training(train: str, *, has_draft: bool) -> DraftTraining:
    """Decides as ``trainer.draft.train`` says. Without a draft no step is due."""
    if not has_draft:
        return DraftTraining(None)
    return AutoDraftTraining() if train == "auto" else DraftTraining(training_interval(train))
