"""Weight conversion in both directions against transformers' forward pass, over one and two gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spawn import run_distributed
from tiny_checkpoints import ARCHITECTURES, VOCAB_SIZE, make_pack, write_checkpoint
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from skyrl_spec.errors import ConfigError
from skyrl_spec.models import parallel
from skyrl_spec.models.conversion import HfTensors, export_weights, hf_shapes, load_weights, policy_rules
from skyrl_spec.models.policy import build_policy, transformer_config
from skyrl_spec.settings.policy import MegatronConfig
from skyrl_spec.specs.model import load_spec, padded_vocab_size
from skyrl_spec.specs.stages import Stages

# fp32; two implementations add in another order.
TOLERANCE = 1e-5


def _check_checkpoint(path: Path, ranks: parallel.Parallel) -> None:
    spec = load_spec(str(path))
    config = MegatronConfig(
        tensor_model_parallel_size=ranks.tp_size, expert_model_parallel_size=ranks.tp_size, dtype="fp32"
    )
    model = build_policy(spec, transformer_config(spec, config, ranks.device), ranks, Stages((spec.num_layers,)))
    rules = policy_rules(spec, padded_vocab_size(spec.vocab_size, ranks.tp_size))
    source = load_file(path / "model.safetensors")
    load_weights(model, rules, HfTensors(path), ranks)

    exported = dict(export_weights(model, rules, ranks))
    expected = {name: tensor for name, tensor in source.items() if "mtp_layers" not in name}
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor), name
    parameters = dict(model.named_parameters())
    shapes = {
        name: shape
        for rule in rules
        for name, shape in zip(rule.hf, hf_shapes(rule, parameters[rule.megatron], ranks), strict=True)
    }
    assert shapes == {name: tensor.shape for name, tensor in expected.items()}

    token_ids = torch.randint(0, VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(1))
    # transformers does not know MiMo.
    hf_class = Qwen2ForCausalLM if spec.num_mtp_layers else AutoModelForCausalLM
    hf = hf_class.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        hidden_TD = model(make_pack(*token_ids.tolist()))
        assert (hidden_TD - hf.model(token_ids).last_hidden_state.flatten(0, 1)).abs().max() < TOLERANCE


def _check_all(_rank: int, paths: list[Path], tp: int) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"), expert_parallel_size=tp)
    for path in paths:
        _check_checkpoint(path, ranks)


def _without_normed_weights(path: Path) -> Path:
    """A mixture whose tokens take the weights of their experts as they are."""
    config = json.loads((path / "config.json").read_text())
    assert config["norm_topk_prob"] is True
    (path / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    return path


@pytest.mark.parametrize("tp", [1, 2])
def test_every_architecture_round_trips_and_equals_transformers(tmp_path: Path, tp: int) -> None:
    paths = [
        write_checkpoint(tmp_path / f"{architecture}-{tied}", architecture, tied=tied)
        for architecture in ARCHITECTURES
        for tied in (False, True)
    ]
    paths.append(_without_normed_weights(write_checkpoint(tmp_path / "other", "Qwen3MoeForCausalLM")))
    run_distributed(_check_all, tp, paths, tp)


def _load_broken(_rank: int, path: Path, expected: str) -> None:
    ranks = parallel.lay_out(1, torch.device("cpu"))
    spec = load_spec(str(path))
    config = transformer_config(spec, MegatronConfig(dtype="fp32"), ranks.device)
    model = build_policy(spec, config, ranks, Stages((spec.num_layers,)))
    with pytest.raises(ConfigError, match=expected):
        load_weights(model, policy_rules(spec, padded_vocab_size(spec.vocab_size, 1)), HfTensors(path), ranks)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = write_checkpoint(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.bias"]
    save_file(weights, path / "model.safetensors")
    run_distributed(_load_broken, 1, path, "model.layers.1.self_attn.k_proj.bias")
