"""``skyrl-spec export`` of a checkpoint, against the tensors of the ranks that wrote it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from spawn import run_distributed
from tiny_checkpoints import dflash_path, make_batch, make_config, write_model
from transformers import AutoConfig

from skyrl_spec.checkpoint import dist
from skyrl_spec.checkpoint.bundle import export_bundle, read_source
from skyrl_spec.checkpoint.hf_export import save_hf
from skyrl_spec.cli import main
from skyrl_spec.models import parallel
from skyrl_spec.settings.compose import to_yaml
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.dflash import dflash_tensor_shapes, read_dflash_spec
from skyrl_spec.specs.model import load_spec, tensor_shapes
from skyrl_spec.specs.mtp import mtp_tensor_shapes
from skyrl_spec.training.trainer import PolicyTrainer

METRICS = {
    "vllm/train/draft_mean_acceptance_length": 2.5,
    "vllm/train/draft_acceptance_rate": 0.75,
    "vllm/train/draft_acceptance_rate_pos_1": 0.8,
    "vllm/train/draft_acceptance_rate_pos_2": 0.7,
    "draft/loss": 1.0,
}


def run_config(model: Path, draft: str, **options: Any) -> Config:
    config = make_config(model, draft=draft, **options)
    config.trainer.run_name = "tiny"
    config.trainer.dflash.num_speculative_tokens = 2
    return config


def train_and_save(rank: int, model: Path, draft: str, tp: int, dtype: str, run_dir: Path, freeze: bool) -> None:
    """Writes a run's checkpoint, and the export of the ranks themselves next to it."""
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    config = run_config(model, draft, tp=tp, dtype=dtype)
    trainer = PolicyTrainer(config, load_spec(str(model)), ranks, total_optimizer_steps=10, freeze_policy=freeze)
    for seed in range(2):
        (trainer.train_draft if freeze else trainer.train_mini_batch)(make_batch(seed))
    extra = {"config": to_yaml(config), "metrics": METRICS, "trainer": {"step": 2}}
    dist.save(run_dir / "checkpoints" / "step_2", trainer.saved_components(), extra)
    save_hf(trainer, run_dir)


@pytest.mark.parametrize(
    ("draft", "tp", "dtype", "freeze"),
    [("mtp", 2, "fp32", False), ("dflash", 2, "bf16", False), ("mtp", 1, "bf16", True), ("dflash", 1, "fp32", True)],
)
def test_a_bundle_is_what_the_ranks_hold(draft: str, tp: int, dtype: str, freeze: bool, tmp_path: Path) -> None:
    model, run_dir, out = write_model(tmp_path / "model", draft), tmp_path / "run", tmp_path / "out"
    (model / "tokenizer.json").write_text("{}")
    run_distributed(train_and_save, tp, model, draft, tp, dtype, run_dir, freeze)
    # A run stands for its newest checkpoint.
    source = read_source(run_dir)
    assert source.directory == run_dir / "checkpoints" / "step_2"
    export_bundle(source, out)
    parts = ["draft", "model"] if draft == "dflash" else ["model"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", *parts]
    for part in parts:
        mine, theirs = (load_file(folder / part / "model.safetensors") for folder in (out, run_dir))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            assert torch.equal(mine[name], tensor), name
        assert (out / part / "config.json").read_text() == (run_dir / part / "config.json").read_text()
    started = load_file(model / "model.safetensors")["model.norm.weight"].to(mine[name].dtype)
    assert torch.equal(load_file(out / "model" / "model.safetensors")["model.norm.weight"], started) == freeze
    assert (out / "model" / "tokenizer.json").read_text() == "{}"
    AutoConfig.from_pretrained(out / "model")
    text = (out / "README.md").read_text()
    assert f'vllm serve ./model --speculative-config \'{{"method": "{draft}"' in text
    assert "| training prompts, sampled | 2.50 | 75.0% | 0.80, 0.70 |" in text
    assert "held-out" not in text


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Directory of a run of one rank with a DFlash draft."""
    model = write_model(tmp_path / "model", "dflash")
    run_distributed(train_and_save, 1, model, "dflash", 1, "fp32", tmp_path / "run", False)
    yield tmp_path / "run"
    # The command refuses it.
    logging.disable(logging.NOTSET)


def test_the_command(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = run_dir / "checkpoints" / "step_2", tmp_path / "out"

    def says(*words: str) -> tuple[int, str]:
        status = main(["export", *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert len(captured.err.splitlines()) == (status != 0)
        return status, captured.out + captured.err

    assert says() == (2, "skyrl-spec: error: checkpoint='': must name a directory; write checkpoint=DIR\n")
    status, line = says(f"checkpoint={checkpoint}", "to=here")
    assert (status, "export: unknown option 'to=here'; " in line) == (2, True)
    status, line = says(f"checkpoint={tmp_path}", f"out={out}")
    assert (status, f"checkpoint={tmp_path}: is no checkpoint of skyrl_spec" in line) == (2, True)
    # Model and draft are in another place now.
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(tmp_path / "model", moved / "model")
    shutil.move(dflash_path(tmp_path / "model"), moved / "draft")
    status, line = says(f"checkpoint={checkpoint}", f"out={out}")
    assert (status, "no such directory" in line, "model=DIR" in line) == (2, True, True)
    status, line = says(f"checkpoint={checkpoint}", f"out={out}", f"model={moved / 'model'}")
    assert (status, "no such directory" in line, "draft=DIR" in line) == (2, True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "run"], "half a bundle was left"
    whole = [f"checkpoint={checkpoint}", f"model={moved / 'model'}", f"draft={moved / 'draft'}"]
    status, line = says(*whole, f"out={out}")
    assert (status, line.splitlines()[0]) == (0, f"exported {checkpoint} to {out}")
    shutil.rmtree(out)
    other = write_model(tmp_path / "other" / "model", "mtp")
    status, line = says(*whole[:1], *whole[2:], f"model={other}", f"out={out}")
    assert (status, f"model={other}: checkpoint={checkpoint} belongs to another model: " in line) == (2, True)
    for name in (".metadata", "__0_0.distcp"):
        (checkpoint / name).rename(tmp_path / name)
        (checkpoint / name).write_bytes(bytes((tmp_path / name).stat().st_size))
        status, line = says(*whole, f"out={out}")
        assert (status, f"checkpoint={checkpoint}: cannot be read (" in line, out.exists()) == (2, True, False)
        (tmp_path / name).replace(checkpoint / name)
    out.mkdir()
    monkeypatch.chdir(out)
    assert says(*whole, "out=.")[0] == 0
    status, line = says(f"checkpoint={checkpoint}", f"out={out}")
    assert (status, f"out={out}: must be a new or empty directory" in line) == (2, True)
    # No directory can be made below a file.
    status, line = says(*whole, f"out={out / 'README.md' / 'x'}")
    assert (status, "could not be written (Not a directory)" in line) == (1, True)


def test_shapes_that_preflight_expects(tmp_path: Path) -> None:
    """Names and shapes of exports against checkpoints that transformers and vLLM read."""
    for draft in ("mtp", "dflash"):
        model = write_model(tmp_path / draft / "model", draft)
        spec = load_spec(str(model))
        found = {name: tuple(tensor.shape) for name, tensor in load_file(model / "model.safetensors").items()}
        assert tensor_shapes(spec) | (mtp_tensor_shapes(spec) if draft == "mtp" else {}) == found
    (spec_path,) = [dflash_path(model)]
    found = {name: tuple(tensor.shape) for name, tensor in load_file(spec_path / "model.safetensors").items()}
    assert dflash_tensor_shapes(read_dflash_spec(str(spec_path))) == found
    assert json.loads((spec_path / "config.json").read_text())["architectures"] == ["DFlashDraftModel"]
