"""Which groups are trained on: DAPO's dynamic sampling, and plain sampling as the same path with one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skyrl_spec.settings.schema import DynamicSamplingConfig
from skyrl_spec.types import Rollout

Group = list[Rollout]


@dataclass(frozen=True)
class Collected:
    """The groups of one train batch, and what it took to get them."""

    # At most as many as asked for; possibly fewer, or none, when max_sample_batches were not enough.
    groups: list[Group]
    # Everything sampled on the way: rewards are reported of these, since a filter would flatter them.
    sampled: list[Group]
    num_batches: int
    # Groups that passed the filter, those beyond what was asked for included.
    num_kept: int


def keep_informative(groups: Sequence[Group]) -> list[Group]:
    """The groups whose rewards differ (equal ones have advantage 0); groups of one, compared with nothing, are kept."""
    return [group for group in groups if len(group) == 1 or any(r.reward != group[0].reward for r in group)]


# trainer.algorithm.dynamic_sampling.type -> the groups it keeps.
FILTERS: dict[str | None, Callable[[Sequence[Group]], list[Group]]] = {None: list, "filter": keep_informative}


def collect_groups(
    sample: Callable[[], Sequence[Group]], num_groups: int, dynamic_sampling: DynamicSamplingConfig
) -> Collected:
    """Calls ``sample`` (a batch of groups each time) until ``num_groups`` passed the filter.

    With a filter at most ``max_sample_batches`` times, then goes on with what it has; without one, once.
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
