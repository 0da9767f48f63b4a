"""Settings of a draft that are decided before a run starts, against the published rules."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

from skyrl_spec.controller.warmup import warmup_config
from skyrl_spec.drafts.kinds import KINDS, trained_kind
from skyrl_spec.drafts.kinds.dflash import decided, plan_dflash, resolve_mask_token
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.draft import DflashConfig
from skyrl_spec.specs.dflash import (
    decay_gamma,
    default_target_layers,
    dflash_hf_config,
    exported_dflash_config,
    parse_dflash_spec,
    read_dflash_spec,
)
from skyrl_spec.specs.model import load_spec

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/arithmetic_dflash"


@pytest.mark.parametrize(
    ("depth", "num_layers", "expected"),
    [
        # Published drafts of Qwen3-4B, Qwen3-8B (36 layers) and a 28-layer model.
        (36, 5, [1, 9, 17, 25, 33]),
        (28, 5, [1, 7, 13, 19, 25]),
        (12, 1, [6]),
        (12, 4, [1, 4, 6, 9]),
    ],
)
def test_default_target_layers(depth: int, num_layers: int, expected: list[int]) -> None:
    assert default_target_layers(depth, num_layers) == expected


def test_decay_gamma_follows_the_block_unless_it_is_set() -> None:
    assert [decay_gamma(DflashConfig(), size) for size in (8, 10, 16, 12)] == [4.0, 5.0, 7.0, 6.0]
    assert decay_gamma(DflashConfig(loss_decay_gamma=3.0), 8) == 3.0


def _tokenizer(mask: int | None, tokens: int = 100) -> SimpleNamespace:
    vocabulary = {f"t{index}": index for index in range(tokens)}
    return SimpleNamespace(mask_token_id=mask, pad_token_id=0, eos_token_id=2, get_vocab=lambda: vocabulary)


def test_mask_token_is_the_one_set_then_the_tokenizers_then_the_first_unused_row() -> None:
    assert resolve_mask_token(50, _tokenizer(7), 128) == 50
    assert resolve_mask_token(None, _tokenizer(7), 128) == 7
    assert resolve_mask_token(None, _tokenizer(None), 128) == 100


def test_mask_token_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.dflash.mask_token_id=null: .* all 100 rows .* are used; set it"):
        resolve_mask_token(None, _tokenizer(None), 100)
    for token in (0, 2):
        with pytest.raises(ConfigError, match=f"mask_token_id={token}: is the padding or end token"):
            resolve_mask_token(token, _tokenizer(None), 128)


def test_a_fresh_draft_has_its_targets_width_and_survives_its_config_json(tmp_path: Path) -> None:
    config = load_config(["experiment=cpu_dflash_grpo"])
    config = replace(config, trainer=replace(config.trainer, dflash=DflashConfig(enabled=True, block_size=6)))
    target = replace(load_spec(str(EXAMPLE / "model")), num_layers=36)
    spec = plan_dflash(config, target, None, mask_token_id=104)
    assert (spec.layers.hidden_size, spec.layers.num_layers, spec.block_size) == (192, 5, 6)
    assert spec.target_layer_ids == (1, 9, 17, 25, 33)
    (tmp_path / "config.json").write_text(json.dumps(dflash_hf_config(spec, "float32")))
    again = read_dflash_spec(str(tmp_path))
    assert replace(again, layers=replace(again.layers, path=spec.layers.path)) == spec
    dflash = decided(config, spec, str(tmp_path)).trainer.dflash
    assert (dflash.num_speculative_tokens, dflash.num_layers, dflash.mask_token_id) == (5, 5, 104)


def test_rope_scaling_is_for_export_and_not_trained_on(tmp_path: Path) -> None:
    spec = read_dflash_spec(str(EXAMPLE / "draft"))
    dflash = DflashConfig(export_rope_scaling={"rope_type": "yarn", "factor": 4.0})
    exported = exported_dflash_config(spec, "bfloat16", dflash)
    assert exported["rope_scaling"]["factor"] == 4.0
    assert exported["rope_theta"] == spec.layers.rope_theta
    with pytest.raises(ConfigError, match=r"rope_scaling in config\.json is not supported"):
        parse_dflash_spec(tmp_path, exported)
    written_by_transformers_5 = exported | {
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    }
    with pytest.raises(ConfigError, match=r"RoPE scaling .* is not supported"):
        parse_dflash_spec(tmp_path, written_by_transformers_5)


def test_an_exported_draft_has_both_forms(tmp_path: Path) -> None:
    """DFlash's own, which is read here, and that of speculators, as vLLM understands it."""
    spec = read_dflash_spec(str(EXAMPLE / "draft"))
    config = exported_dflash_config(spec, "float32", DflashConfig(num_speculative_tokens=4))
    assert replace(parse_dflash_spec(tmp_path, config), layers=spec.layers) == spec
    assert SpeculatorsConfig.extract_vllm_speculative_config(config) == {
        "method": "dflash",
        "num_speculative_tokens": 4,
    }
    layers = SpeculatorsConfig.extract_transformers_pre_trained_config(copy.deepcopy(config))
    assert layers["dflash_config"] | {"causal": False} == config["dflash_config"] | {"sample_from_anchor": False}
    same = ("architectures", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rope_theta", "vocab_size")
    assert all(layers[name] == config[name] for name in same)
    assert config["speculators_config"]["verifier"]["name_or_path"] == "./model"


def test_a_published_drafts_config_json_is_read(tmp_path: Path) -> None:
    """A config.json with the entries of drafts on the hub, including those that are ignored."""
    config = {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 16,
        "bos_token_id": 151643,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "layer_types": ["full_attention"] * 5,
        "max_position_embeddings": 40960,
        "max_window_layers": 5,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 5,
        "num_key_value_heads": 8,
        "num_target_layers": 36,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    spec = parse_dflash_spec(tmp_path, config)
    assert (spec.block_size, spec.mask_token_id, spec.num_target_layers) == (16, 151669, 36)
    assert spec.target_layer_ids == tuple(default_target_layers(36, 5))
    assert (spec.layers.head_dim, spec.layers.rope_theta) == (128, 1e6)


def test_engines_draft_what_is_trained() -> None:
    config = load_config(["experiment=cpu_dflash_grpo", "trainer.dflash.num_speculative_tokens=7"])
    trainer = config.trainer
    assert trained_kind(trainer) is KINDS["dflash"]
    expected = {"method": "dflash", "model": trainer.dflash.path, "num_speculative_tokens": 7}
    assert build_speculative_config(config) == expected
    user = {"method": "dflash", "disable_padded_drafter_batch": True}
    config.generator.inference_engine.speculative_config = user
    assert build_speculative_config(config) == user | expected


def test_a_warm_up_is_a_run_of_its_own() -> None:
    overrides = ["experiment=cpu_dflash_grpo", "algorithm=dapo"]
    warm = warmup_config(load_config(overrides)).trainer
    assert warm.run_dir == "runs/cpu_dflash_grpo_warmup"
    assert warm.dflash.path is None
    assert warm.dflash.optimizer_config == warm.warmup.optimizer_config
    assert warm.algorithm.dynamic_sampling.type is None
    kept = warmup_config(load_config([*overrides, "trainer.warmup.from_scratch=false"])).trainer
    assert kept.dflash.path == "examples/arithmetic_dflash/draft"
    with pytest.raises(ConfigError, match="there is no draft to warm up"):
        warmup_config(load_config([*overrides, "trainer.dflash.enabled=false"]))
