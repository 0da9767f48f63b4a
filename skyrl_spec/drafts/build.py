"""Which draft a configuration asks for."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_spec.config import Config, OptimizerConfig
from skyrl_spec.drafts.base import Draft
from skyrl_spec.drafts.dflash import DflashDraft
from skyrl_spec.drafts.mtp import MtpDraft
from skyrl_spec.megatron.conversion import HfTensors, load_weights
from skyrl_spec.megatron.parallel import Parallel
from skyrl_spec.model_spec import ModelSpec


def build_draft(
    config: Config, spec: ModelSpec, trunk: TransformerConfig, parallel: Parallel
) -> tuple[Draft, OptimizerConfig] | None:
    """The draft with its starting weights and its optimizer's settings; None without one."""
    trainer, temperature = config.trainer, config.generator.sampling_params.temperature
    draft: Draft
    if trainer.mtp.enabled:
        draft, optimizer = MtpDraft(trainer.mtp, spec, trunk, parallel, temperature), trainer.mtp.optimizer_config
        setting = "trainer.policy.model.path"
    elif trainer.dflash.enabled:
        draft = DflashDraft(trainer.dflash, spec, trunk, parallel, temperature, trainer.seed)
        optimizer, setting = trainer.dflash.optimizer_config, "trainer.dflash.path"
    else:
        return None
    load_weights(draft.module, draft.rules, HfTensors(draft.source, setting), parallel)
    return draft, optimizer
