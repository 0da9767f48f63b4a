"""What workers keep in host memory while the engines generate."""

from __future__ import annotations

from typing import NamedTuple

from skyrl_spec.drafts.kinds import trained_kind
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
    """What the settings move. With ``trainer.placement.colocate_all`` that is everything, unless a setting says no."""
    trainer, kind = config.trainer, trained_kind(config.trainer)
    draft = False if kind is None else kind.settings(trainer).optimizer_config.offload_after_step
    settings = (
        trainer.policy.optimizer_config.offload_after_step,
        draft,
        trainer.policy.megatron_config.cpu_offload,
        trainer.ref.cpu_offload if trainer.algorithm.use_kl_loss else False,
    )
    by_default = trainer.placement.colocate_all
    return Offloads(*(by_default if setting is None else setting for setting in settings))
