"""Names of parameters in checkpoints do not depend on Megatron's version.

This file lists the names, so this test fails under a Megatron version with other names. The transformer layer inside an
MTP layer has one name in 0.16 and another since 0.17. A test renames it to get the other version.
A worker process has no vLLM, whose stand-ins for parts of ``torch.cuda`` hide what Megatron needs on CPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_checkpoint
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from skyrl_spec.checkpoint import dist
from skyrl_spec.models import megatron_patches, parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

NAMES = ("transformer_layer", "mtp_model_layer")
MTP_PARAMETERS = {
    "layers.0.enorm.weight",
    "layers.0.hnorm.weight",
    "layers.0.eh_proj.weight",
    "layers.0.transformer_layer.input_layernorm.weight",
    "layers.0.transformer_layer.self_attention.linear_qkv.weight",
    "layers.0.transformer_layer.self_attention.linear_qkv.bias",
    "layers.0.transformer_layer.self_attention.linear_proj.weight",
    "layers.0.transformer_layer.pre_mlp_layernorm.weight",
    "layers.0.transformer_layer.mlp.linear_fc1.weight",
    "layers.0.transformer_layer.mlp.linear_fc2.weight",
    "layers.0.final_layernorm.weight",
}


def _rename(mtp_layer: nn.Module, name: str) -> None:
    old = next(name for name in NAMES if hasattr(mtp_layer, name))
    inner = getattr(mtp_layer, old)
    delattr(mtp_layer, old)
    setattr(mtp_layer, name, inner)


def _check(_rank: int, model: Path, root: Path) -> None:
    ranks = parallel.lay_out(1, torch.device("cpu"))
    trainer = PolicyTrainer(make_config(model), load_spec(str(model)), ranks, total_optimizer_steps=1)
    components = {"draft": trainer.saved_components()["draft"]}
    block = components["draft"].trainable.module
    trained = {name: parameter.detach().clone() for name, parameter in megatron_patches.named_parameters(block).items()}
    assert trained.keys() == MTP_PARAMETERS
    expected = {f"draft.{kind}.{name}" for kind in ("param", "exp_avg", "exp_avg_sq") for name in MTP_PARAMETERS}
    for saving, loading in (NAMES, reversed(NAMES)):
        directory = root / saving / "step_1"
        _rename(block.layers[0], saving)
        dist.save(directory, components, {})
        assert set(FileSystemReader(directory).read_metadata().state_dict_metadata) == expected
        _rename(block.layers[0], loading)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.fill_(7.0)
        dist.load(directory, components)
        assert any(f".{loading}." in name for name, _ in block.named_parameters())
        for name, parameter in megatron_patches.named_parameters(block).items():
            assert torch.equal(parameter, trained[name]), name


def test_a_checkpoint_loads_under_either_name_of_the_mtp_layer(tmp_path: Path) -> None:
    run_distributed(_check, 1, write_checkpoint(tmp_path / "model"), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_transformer_layer_of_an_mtp_layer_is_found(name: str) -> None:
    inner = nn.Linear(1, 1)
    assert megatron_patches.mtp_transformer_layer(nn.ModuleDict({"eh_proj": nn.Linear(1, 1), name: inner})) is inner


def test_a_third_name_is_an_error_that_names_the_fix() -> None:
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.\d.*it has: eh_proj, layer\).*mtp_transformer_layer"):
        megatron_patches.mtp_transformer_layer(nn.ModuleDict({"eh_proj": nn.Linear(1, 1), "layer": nn.Linear(1, 1)}))


def train_without_vllm(root: str) -> None:
    """One step with each kind of optimizer, and a checkpoint."""
    model, cpu = Path(root) / "model", torch.device("cpu")
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=0, world_size=1)
    ranks = parallel.lay_out(1, cpu)
    for distributed in (False, True):
        config = make_config(model, distributed=distributed)
        trainer = PolicyTrainer(config, load_spec(str(model)), ranks, total_optimizer_steps=1)
        trainer.forward_backward(make_batch(0))
        trainer.optimizer_step()
        dist.save(Path(root) / str(distributed) / "step_1", trainer.saved_components(), {})
        dist.load(Path(root) / str(distributed) / "step_1", trainer.saved_components())
    assert "vllm" not in sys.modules


def test_a_worker_needs_no_stand_in_of_vllm(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    script = "import sys, test_megatron_versions as t; t.train_without_vllm(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
