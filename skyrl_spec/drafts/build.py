"""Which draft a configuration asks for."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_spec.config import Config, OptimizerConfig
from skyrl_spec.drafts.base import Draft
from skyrl_spec.drafts.mtp import MtpDraft
from skyrl_spec.megatron.conversion import HfTensors
from skyrl_spec.megatron.parallel import Parallel
from skyrl_spec.model_spec import ModelSpec


def build_draft(
    config: Config, spec: ModelSpec, trunk: TransformerConfig, tensors: HfTensors, parallel: Parallel
) -> tuple[Draft, OptimizerConfig] | None:
    """The draft with its starting weights and its optimizer's settings; None without one."""
    if not config.trainer.mtp.enabled:
        return None
    draft = MtpDraft(config.trainer.mtp, spec, trunk, parallel, config.generator.sampling_params.temperature)
    draft.load(tensors)
    return draft, config.trainer.mtp.optimizer_config
