"""What workers keep in host memory while the engines generate, and how deep the engines sleep meanwhile."""

from __future__ import annotations

from typing import NamedTuple

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.settings.derived import sleep_level
from skyrl_spec.settings.schema import Config


class Offloads(NamedTuple):
    """Parts of a worker that go to host memory between training steps."""

    # Optimizer state and gradients.
    policy_state: bool
    draft_state: bool
    # Of policy and draft.
    weights: bool
    reference: bool


def offloads(config: Config) -> Offloads:
    """The parts that the settings move. Where engines sleep that is everything, unless a setting says no."""
    trainer, kind = config.trainer, trained_kind(config.trainer)
    draft = False if kind is None else kind.settings(trainer).optimizer_config.offload_after_step
    settings = (
        trainer.policy.optimizer_config.offload_after_step,
        draft,
        trainer.policy.megatron_config.cpu_offload,
        trainer.ref.cpu_offload if trainer.algorithm.use_kl_loss else False,
    )
    # Memory that is freed beside engines that keep theirs is of use to nobody.
    by_default = sleep_level(config) > 0
    return Offloads(*(by_default if setting is None else setting for setting in settings))


def deepest_sleep(config: Config, *, trains_policy: bool = True) -> int:
    """Level at which engines may sleep. What they lose at level 2, a sync must bring, and it brings what is trained.

    vLLM can keep parameters by name, but not the tensors that a DFlash draft makes of its weights.
    """
    has_frozen_draft = build_speculative_config(config) is not None and trained_kind(config.trainer) is None
    return min(1, sleep_level(config)) if has_frozen_draft or not trains_policy else sleep_level(config)
