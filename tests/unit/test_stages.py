"""Layers of pipeline stages."""

from __future__ import annotations

import pytest

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.policy import MegatronConfig
from skyrl_spec.specs.stages import Stages


def _stages(num_layers: int, size: int, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    megatron = MegatronConfig(
        pipeline_model_parallel_size=size,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    return Stages.of(num_layers, megatron).num_layers


def test_layers_are_divided_as_the_settings_say() -> None:
    assert _stages(12, 1) == (12,)
    assert _stages(12, 3) == (4, 4, 4)
    assert _stages(12, 3, first=2) == (2, 5, 5)
    assert _stages(12, 3, last=2) == (5, 5, 2)
    assert _stages(12, 4, first=1, last=3) == (1, 4, 4, 3)
    assert _stages(12, 2, first=5, last=7) == (5, 7)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((12, 5), "pipeline_model_parallel_size=5: 12 of the model's 12 layers are left for 5 stages; set"),
        (
            (12, 13),
            "pipeline_model_parallel_size=13: the model has fewer layers, 12, and every stage needs one; lower it",
        ),
        ((12, 2, 5, 6), "1 of the model's 12 layers are left for 0 stages with trainer.policy.megatron_config.num_la"),
        ((12, 3, 6, 6), "0 of the model's 12 layers are left for 1 stages"),
        ((12, 3, 12), "0 of the model's 12 layers are left for 2 stages"),
    ],
)
def test_layers_that_cannot_be_divided_are_refused(arguments: tuple[int, ...], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _stages(*arguments)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_layer_and_parameter_has_its_stage() -> None:
    stages = Stages((1, 3, 2))
    assert [list(stages.layers(stage)) for stage in range(3)] == [[0], [1, 2, 3], [4, 5]]
    assert [stages.of_layer(layer) for layer in range(6)] == [0, 1, 1, 1, 2, 2]
    assert stages.of_parameter("embedding.word_embeddings.weight") == stages.of_tensor("model.embed_tokens.weight") == 0
    assert stages.of_parameter("decoder.layers.3.mlp.linear_fc1.weight") == 1
    assert stages.of_tensor("model.layers.4.mlp.up_proj.weight") == 2
    for name in ("decoder.final_layernorm.weight", "output_layer.weight"):
        assert stages.of_parameter(name) == 2
    for name in ("model.norm.weight", "lm_head.weight"):
        assert stages.of_tensor(name) == 2
