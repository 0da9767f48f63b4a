"""Interface of a kind of draft: its settings, start, shapes, vLLM options and export.

A ``DraftKind`` has no state. Its methods take the settings, so they work before any process starts, and import torch
only if they say so. ``build`` makes the ``drafts.base.Draft`` that is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.draft import DflashConfig, MtpConfig
from skyrl_spec.settings.schema import Config, TrainerConfig
from skyrl_spec.specs.files import Shapes
from skyrl_spec.specs.flops import Flops
from skyrl_spec.specs.model import ModelSpec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from skyrl_spec.drafts.base import Draft
    from skyrl_spec.models.conversion import Rule
    from skyrl_spec.models.parallel import Parallel

DraftSettings = MtpConfig | DflashConfig
SPECULATIVE_CONFIG = "generator.inference_engine.speculative_config"


class DraftShapes(NamedTuple):
    """Shapes of a draft's tensors in its checkpoint, and its number of layers."""

    tensors: Shapes
    num_layers: int


class DraftKind(ABC):
    """A kind of draft that can be trained."""

    # vLLM's name of the method, and the name of the section of settings under ``trainer``.
    method: str
    # False: the draft's tensors are part of the policy's checkpoint.
    has_own_directory: bool
    # Setting that enables it. Errors name it.
    on_setting: str

    # ---- Settings ---------------------------------------------------------------------------------------------------

    def settings(self, trainer: TrainerConfig) -> DraftSettings:
        """Section ``trainer.<method>``."""
        return getattr(trainer, self.method)

    def with_settings(self, trainer: TrainerConfig, **changes: Any) -> TrainerConfig:
        """``trainer`` with ``changes`` of ``trainer.<method>``."""
        section: Any = replace(self.settings(trainer), **changes)
        return replace(trainer, **{self.method: section})

    @abstractmethod
    def describe(self, trainer: TrainerConfig) -> str:
        """One line for the start-up panel."""

    @abstractmethod
    def check_user_speculation(self, user: dict[str, Any]) -> None:
        """Raises ``ConfigError`` if the user's speculative_config contradicts the draft that is trained."""

    # ---- Start ------------------------------------------------------------------------------------------------------

    def path(self, trainer: TrainerConfig) -> str | None:
        """Directory or hub name of the checkpoint that holds the draft at the start. None: from scratch."""
        return trainer.policy.model.path

    def with_path(self, trainer: TrainerConfig, path: str | None) -> TrainerConfig:
        """``trainer`` with ``path`` as the draft's own directory; unchanged if the kind has none."""
        return trainer

    @abstractmethod
    def preflight(self, config: Config, spec: ModelSpec, *, from_scratch: bool) -> None:
        """Raises ``ConfigError`` if the draft does not fit the policy, or its files are incomplete."""

    def decide(self, config: Config, spec: ModelSpec, tokenizer: Any, *, may_write: bool) -> Config:
        """``config`` with every open setting of the draft filled in.

        With ``may_write``, a draft from scratch is written to run_dir (imports torch).
        """
        return config

    def write_fresh(self, config: Config) -> Config:
        """``config`` of a warm-up from scratch, whose draft is written with random weights. Imports torch."""
        return config

    # ---- Shapes -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def shapes(
        self, config: Config, spec: ModelSpec, path: str | None, *, may_be_unwritten: bool = False
    ) -> DraftShapes:
        """Shapes of the draft for the policy ``spec``.

        Args:
            path: directory or hub name of a draft with its own directory.
            may_be_unwritten: ``path`` may not exist yet, as for a draft from scratch before the run starts. Then the
                settings decide the shapes.
        """

    @abstractmethod
    def training_layer_tokens(self, config: Config, spec: ModelSpec, tokens: int) -> int:
        """Tokens times draft layers in the draft's forward pass over a micro-batch of ``tokens`` tokens."""

    @abstractmethod
    def training_flops(self, config: Config, spec: ModelSpec, prompt: int, response: int) -> Flops:
        """Operations of the draft's training on one document of the policy ``spec``, in the mean."""

    # ---- vLLM -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def speculative_config(self, trainer: TrainerConfig) -> dict[str, Any]:
        """vLLM's speculative_config for the draft."""

    @abstractmethod
    def frozen_config(self, trainer: TrainerConfig) -> dict[str, Any]:
        """vLLM's speculative_config for the draft as it is at the start, when it is not trained.

        Raises:
            ConfigError: the draft starts from scratch.
        """

    def max_draft_tokens(self, draft: Path | None) -> int | None:
        """Most tokens that the draft in directory ``draft`` can draft at a time. None: any number."""
        return None

    @abstractmethod
    def is_in(self, config: dict[str, Any]) -> bool:
        """Whether ``config`` is the config.json of a checkpoint with a draft of this kind."""

    # ---- Training and export ----------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, config: Config, spec: ModelSpec, trunk: TransformerConfig, parallel: Parallel) -> Draft:
        """The draft on this rank's device, weights not yet loaded. Imports Megatron."""

    @abstractmethod
    def rules(self, trainer: TrainerConfig, spec: ModelSpec) -> list[Rule]:
        """Conversion of the draft's weights. Imports Megatron."""

    @abstractmethod
    def num_positions(self, config: Config, spec: ModelSpec) -> int:
        """Drafted tokens of a chain in training."""

    def captured_layers(self, config: Config, spec: ModelSpec) -> list[int]:
        """Layers of the policy whose outputs the draft reads."""
        return []

    def hf_config(self, trainer: TrainerConfig, torch_dtype: str) -> dict[str, Any] | None:
        """config.json of an exported draft. None: it is a part of the policy's checkpoint.

        ``torch_dtype`` is a name such as "float32".
        """
        return None


def require_user_speculation(condition: bool, user: dict[str, Any], message: str) -> None:
    """Raises ``ConfigError`` about the user's speculative_config unless ``condition``."""
    if not condition:
        raise ConfigError(f"{SPECULATIVE_CONFIG}={user}: {message}")
