"""The draft of a rank with its optimizer, loaded from its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_spec.drafts.base import Draft
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.models.conversion import HfTensors, load_weights
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.settings.derived import training_interval, uses_fp32_head
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.files import POLICY_PATH
from skyrl_spec.specs.model import ModelSpec
from skyrl_spec.training.copies import DraftCopies
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.types import FROZEN


@dataclass(frozen=True)
class TrainableDraft:
    """A draft with its optimizer, and copies of its weights. The draft of the start is kept as ``FROZEN``."""

    draft: Draft
    trainable: Trainable
    copies: DraftCopies


def load_draft(
    config: Config, spec: ModelSpec, trunk: TransformerConfig, parallel: Parallel, total_policy_steps: int
) -> TrainableDraft | None:
    """The draft that ``config`` trains, for a policy with ``total_policy_steps`` optimizer steps.

    None if it trains none, and on other pipeline stages than the last.
    """
    trainer = config.trainer
    kind = trained_kind(trainer)
    if kind is None or not parallel.is_last_stage:
        return None
    draft = kind.build(config, spec, trunk, parallel)
    draft.fp32_logits = uses_fp32_head(config)
    setting = f"trainer.{kind.method}.path" if kind.has_own_directory else POLICY_PATH
    load_weights(draft.module, draft.rules, HfTensors(draft.source, setting), parallel)
    trainable = Trainable(
        draft.module,
        draft.module.config,
        kind.settings(trainer).optimizer_config,
        trainer.policy.megatron_config,
        parallel,
        -(-total_policy_steps // (training_interval(trainer.draft.train) or 1)),
        trainer.max_skipped_updates,
        is_on_one_stage=True,
    )
    copies = DraftCopies(trainable)
    copies.keep(FROZEN)
    return TrainableDraft(draft, trainable, copies)
