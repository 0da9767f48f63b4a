"""Groups that were begun and not trained on: which of them a step takes, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from skyrl_spec.algorithms.filters import Group
from skyrl_spec.controller.conversation import Conversation
from skyrl_spec.types import Generation, Prompt, Rollout, Versions


@dataclass(eq=False)
class OpenGroup:
    """A group that was begun and not trained on. ``began``: the policy's version at that time."""

    number: int
    prompt: Prompt
    began: int
    conversations: list[Conversation] = field(default_factory=list)
    # Once it has finished.
    rollouts: Group | None = None


def choose(
    groups: Sequence[OpenGroup], version: int, size: int, max_staleness: int, least: int | None = None
) -> list[OpenGroup] | None:
    """The groups of the step that begins at ``version``: the oldest ``size`` that have finished. None: it must wait.

    It waits for ``least`` groups (None: ``size``), and for old ones that the steps after it could not take in time,
    ``size`` a step.
    """
    in_order = sorted(groups, key=lambda group: (group.began, group.number))
    chosen = [group for group in in_order if group.rollouts is not None][:size]
    if len(chosen) < min(size if least is None else least, len(in_order)):
        return None
    left = [group for group in in_order if group not in chosen]
    last_steps = [group.began + max_staleness for group in left]
    in_time = all(last >= version + 1 + index // size for index, last in enumerate(last_steps))
    return chosen if in_time else None


def group_state(group: OpenGroup) -> dict[str, Any]:
    rollouts = None if group.rollouts is None else [rollout_state(rollout) for rollout in group.rollouts]
    return {"number": group.number, "uid": group.prompt.uid, "began": group.began, "rollouts": rollouts}


def rollout_state(rollout: Rollout) -> dict[str, Any]:
    generation = rollout.generation
    return {
        "token_ids": generation.token_ids,
        "logprobs": generation.logprobs,
        "finish_reason": generation.finish_reason,
        "versions": generation.versions.label,
        "updates": [(index, versions.label) for index, versions in generation.updates],
        "num_steps": list(generation.num_steps),
        "text": rollout.text,
        "reward": rollout.reward,
        "loss_mask": rollout.loss_mask,
        "error": rollout.error,
        "turns": list(rollout.turns),
    }


def rollout_of(prompt: Prompt, state: dict[str, Any]) -> Rollout:
    updates = tuple((index, Versions.of_label(label)) for index, label in state["updates"])
    generation = Generation(
        state["token_ids"],
        state["logprobs"],
        state["finish_reason"],
        Versions.of_label(state["versions"]),
        updates,
        tuple(state["num_steps"]),
    )
    return Rollout(
        prompt,
        generation,
        state["text"],
        state["reward"],
        state["loss_mask"],
        state["error"],
        tuple(state["turns"]),
    )
