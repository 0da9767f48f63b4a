"""A model whose head is tied and stored nevertheless, as some published ones: trained, synced and exported as tied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from runs import ROOT, SMALL, finish
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from skyrl_spec.cli import main
from skyrl_spec.specs.model import EMBEDDING, OUTPUT_HEAD

SOURCE = ROOT / "examples" / "arithmetic_dflash" / "model"


def tied_model(directory: Path) -> Path:
    """The DFlash example's model with a tied head, which the file repeats."""
    shutil.copytree(SOURCE, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[OUTPUT_HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return directory


def rows(path: Path) -> Path:
    lines = (ROOT / "examples/arithmetic_mtp/data/train.jsonl").read_text().splitlines()[:16]
    path.write_text("".join(json.dumps(json.loads(line) | {"env_class": "length"}) + "\n" for line in lines))
    return path


def test_a_stored_head_of_a_tied_model_is_its_embedding(tmp_path: Path) -> None:
    run_dir, model = tmp_path / "run", tied_model(tmp_path / "tied")
    _, records = finish(
        run_dir,
        "experiment=cpu_dflash_grpo",
        *SMALL,
        f"trainer.policy.model.path={model}",
        "trainer.eval_before_train=false",
        "trainer.eval_interval=0",
        # With its embedding as its head, the model says nothing that gsm8k rewards.
        f"data.train_data=[{rows(tmp_path / 'rows.jsonl')}]",
        "environment.custom.length=length_environment:LengthEnv",
    )
    assert records[-1]["trainer/step"] == 2
    assert main(["export", f"checkpoint={run_dir}", f"out={tmp_path / 'bundle'}"]) == 0
    before = load_file(model / "model.safetensors")
    for exported in (run_dir / "model", tmp_path / "bundle" / "model"):
        tensors = load_file(exported / "model.safetensors")
        assert tensors.keys() == before.keys() - {OUTPUT_HEAD}
        assert not torch.equal(tensors[EMBEDDING], before[EMBEDDING].to(tensors[EMBEDDING].dtype))
        loaded = AutoModelForCausalLM.from_pretrained(exported)
        assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
        assert torch.equal(loaded.lm_head.weight, tensors[EMBEDDING])
