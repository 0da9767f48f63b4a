"""Choice of the groups to train on: DAPO's dynamic sampling. Without a filter it takes one batch as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skyrl_spec.settings.algorithm import DynamicSamplingConfig
from skyrl_spec.types import Rollout

Group = list[Rollout]


@dataclass(frozen=True)
class Collected:
    """The groups of one train batch, and counts of the sampling that produced them."""

    # At most the number asked for. Fewer, or none, if max_sample_batches were not enough.
    groups: list[Group]
    # All groups that were sampled. Reported rewards are means over these, because the filter biases the others.
    sampled: list[Group]
    num_batches: int
    # Groups that passed the filter, including those beyond the number asked for.
    num_kept: int


def keep_informative(groups: Sequence[Group]) -> list[Group]:
    """Groups whose rewards differ, because equal rewards give advantage 0. Groups of one response are kept."""
    return [group for group in groups if len(group) == 1 or any(r.reward != group[0].reward for r in group)]


# Filters by trainer.algorithm.dynamic_sampling.type.
FILTERS: dict[str | None, Callable[[Sequence[Group]], list[Group]]] = {None: list, "filter": keep_informative}


def collect_groups(
    sample: Callable[[], Sequence[Group]], num_groups: int, dynamic_sampling: DynamicSamplingConfig
) -> Collected:
    """Groups for one train batch. Each call of ``sample`` returns a batch of groups.

    With a filter, ``sample`` is called until ``num_groups`` groups passed it, at most ``max_sample_batches`` times.
    Without a filter it is called once.
    """
    keep = FILTERS[dynamic_sampling.type]
    max_batches = 1 if dynamic_sampling.type is None else dynamic_sampling.max_sample_batches
    sampled: list[Group] = []
    kept: list[Group] = []
    num_batches = 0
    while len(kept) < num_groups and num_batches < max_batches:
        groups = sample()
        num_batches += 1
        sampled.extend(groups)
        kept.extend(keep(groups))
    return Collected(kept[:num_groups], sampled, num_batches, len(kept))
