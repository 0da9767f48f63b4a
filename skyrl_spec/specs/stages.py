"""Which pipeline stage has which layers of a model. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.policy import MegatronConfig

_SETTING = "trainer.policy.megatron_config"


@dataclass(frozen=True)
class Stages:
    """Stages of consecutive layers. The first one has the embedding too, the last one final norm and output head."""

    num_layers: tuple[int, ...]

    @classmethod
    def of(cls, num_layers: int, megatron: MegatronConfig) -> Stages:
        """The stages of a model with this many layers.

        Raises:
            ConfigError: the layers cannot be divided so.
        """
        size = megatron.pipeline_model_parallel_size
        first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
        if size == 1:
            return cls((num_layers,))
        if size > num_layers:
            raise ConfigError(
                f"{_SETTING}.pipeline_model_parallel_size={size}: the model has fewer layers, {num_layers}, and every "
                "stage needs one; lower it"
            )
        left, num_others = num_layers - (first or 0) - (last or 0), size - (first is not None) - (last is not None)
        others = left // num_others if num_others else 0
        if others * num_others != left or (num_others and others < 1):
            given = [f"first_pipeline_stage={first}"] * (first is not None)
            given += [f"last_pipeline_stage={last}"] * (last is not None)
            ends = "".join(f" with {_SETTING}.num_layers_in_{one}" for one in given)
            raise ConfigError(
                f"{_SETTING}.pipeline_model_parallel_size={size}: {left} of the model's {num_layers} layers are left "
                f"for {num_others} stages{ends}; set {_SETTING}.num_layers_in_first_pipeline_stage and "
                "num_layers_in_last_pipeline_stage so that equal numbers are left for the others"
            )
        middle = [others] * num_others
        return cls((*([first] if first is not None else []), *middle, *([last] if last is not None else [])))

    def layers(self, stage: int) -> range:
        """Numbers of a stage's layers in the model."""
        first, end = list(pairwise([0, *accumulate(self.num_layers)]))[stage]
        return range(first, end)

    def of_layer(self, layer: int) -> int:
        """The stage that has this layer."""
        return bisect_right(list(accumulate(self.num_layers)), layer)

    @property
    def last(self) -> int:
        return len(self.num_layers) - 1

    def of_tensor(self, name: str) -> int:
        """The first stage that has a tensor of the trunk, by its name in a checkpoint."""
        if name.startswith("model.embed_tokens."):
            return 0
        if name.startswith("model.layers."):
            return self.of_layer(int(name.split(".")[2]))
        return self.last

    def of_parameter(self, name: str) -> int:
        """The first stage that has a parameter of the trunk, by its name in Megatron."""
        if name.startswith("embedding."):
            return 0
        if name.startswith("decoder.layers."):
            return self.of_layer(int(name.split(".")[2]))
        return self.last
