"""What a user can get wrong, typed at the real command: one line, status 2, within seconds, nothing left running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import run_command
from safetensors.numpy import save_file

from skyrl_spec.compose import load_config
from skyrl_spec.config import ConfigError
from skyrl_spec.draft_spec import dflash_tensor_shapes, parse_dflash_spec
from skyrl_spec.preflight import preflight
from skyrl_spec.validation import validate

TIME_LIMIT_S = 15.0
ENGINE = "generator.inference_engine"
PATH = "trainer.policy.model.path"
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["MiMoForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 1,
}
DRAFT_CONFIG: dict[str, Any] = {
    **{key: value for key, value in MODEL_CONFIG.items() if key != "num_nextn_predict_layers"},
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "block_size": 4,
    "num_target_layers": 8,
    "dflash_config": {"mask_token_id": 31, "target_layer_ids": [1, 5], "causal": False},
}
MTP_TENSOR = "model.mtp_layers.0.input_proj.weight"
ROW = {"prompt": [{"role": "user", "content": "1+1="}], "env_class": "gsm8k"}


@dataclass(frozen=True)
class Workspace:
    """A model directory and a dataset that are right, and the overrides that name them."""

    root: Path

    @property
    def overrides(self) -> list[str]:
        return [
            "experiment=cpu_mtp_grpo",
            f"{PATH}={self.root / 'model'}",
            f"data.train_data=[{self.root / 'rows.jsonl'}]",
            f"data.val_data=[{self.root / 'rows.jsonl'}]",
            f"trainer.run_dir={self.root / 'run'}",
        ]

    def model(self, tensors: tuple[str, ...] = ("lm_head.weight", MTP_TENSOR), **changes: Any) -> Path:
        """A model directory of which only the headers are real; a change to None takes the entry out."""
        directory = self.root / f"model-{uuid.uuid4().hex[:8]}"
        directory.mkdir()
        config = {key: value for key, value in (MODEL_CONFIG | changes).items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))
        save_file({name: np.zeros(2, np.float32) for name in tensors}, directory / "model.safetensors")
        return directory

    def dflash(self, path: Path | None = None, *, target: dict[str, Any] | None = None) -> list[str]:
        """A DFlash draft (from scratch without ``path``) on a Qwen3 model of eight layers."""
        of_target = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 8, "num_nextn_predict_layers": None}
        model = self.model(("lm_head.weight",), **(of_target | (target or {})))
        draft = "null" if path is None else str(path)
        return [
            f"{PATH}={model}",
            "trainer.mtp.enabled=false",
            "trainer.dflash.enabled=true",
            "trainer.dflash.num_layers=null",
            f"trainer.dflash.path={draft}",
        ]

    def draft(self, *, without: str | None = None, **changes: Any) -> Path:
        """A DFlash draft's directory of which only the headers are real."""
        directory = self.root / f"draft-{uuid.uuid4().hex[:8]}"
        directory.mkdir()
        config = DRAFT_CONFIG | changes
        (directory / "config.json").write_text(json.dumps(config))
        names = dflash_tensor_shapes(parse_dflash_spec(directory, DRAFT_CONFIG)).keys() - {without}
        save_file({name: np.zeros(2, np.float32) for name in names}, directory / "model.safetensors")
        return directory

    def rows(self, *rows: Any) -> Path:
        file = self.root / f"rows-{uuid.uuid4().hex[:8]}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return file

    def file(self, name: str, content: bytes) -> Path:
        (self.root / name).write_bytes(content)
        return self.root / name


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("bad_input"))
    space.model().rename(space.root / "model")
    space.rows(ROW, ROW).rename(space.root / "rows.jsonl")
    return space


def broken_model(space: Workspace) -> Path:
    directory = space.model()
    (directory / "model.safetensors").write_bytes(b"no header")
    return directory


def parquet_without_prompt(space: Workspace) -> Path:
    file = space.root / "no_prompt.parquet"
    pq.write_table(pa.table({"question": ["1+1="]}), file)
    return file


# The mistake, as overrides; and what the line must hold: setting and value, what is allowed, the mend.
Mistake = Callable[[Workspace], list[str]]
MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    "unknown key": (
        lambda _: ["trainer.mtp.num_spec_tokens=3"],
        ("trainer.mtp.num_spec_tokens: unknown setting", "did you mean trainer.mtp.num_speculative_tokens?"),
    ),
    "unknown experiment": (
        lambda _: ["experiment=cpu_mtp_gpro"],
        ("experiment=cpu_mtp_gpro: no such experiment", "cpu_mtp_dapo, cpu_mtp_grpo", "did you mean cpu_mtp_grpo?"),
    ),
    "wrong type": (
        lambda _: ["trainer.train_batch_size=many"],
        ("trainer.train_batch_size: Value 'many'", "expected an integer"),
    ),
    "both drafts": (
        lambda _: ["trainer.dflash.enabled=true"],
        ("trainer.dflash.enabled=true: one draft at a time", "turn one of them off"),
    ),
    "no draft tokens": (
        lambda _: ["trainer.mtp.num_speculative_tokens=0"],
        ("trainer.mtp.num_speculative_tokens=0: must be at least 1", "change it"),
    ),
    "lossy rejection": (
        lambda _: [f"{ENGINE}.speculative_config={{method: mtp, rejection_sample_method: synthetic}}"],
        (f"{ENGINE}.speculative_config.rejection_sample_method='synthetic'", "only 'standard'", "remove the key"),
    ),
    "no such model": (
        lambda space: [f"{PATH}={space.root}/nowhere"],
        (f"{PATH}=", "nowhere: no such directory", "give a Hugging Face checkpoint directory or hub name"),
    ),
    "unreachable hub": (
        lambda _: [f"{PATH}=someone/some-model"],
        (f"{PATH}=someone/some-model: neither a local directory nor found", "check the network"),
    ),
    "model directory without config": (
        lambda space: [f"{PATH}={space.root}"],
        (f"{PATH}=", "has no config.json", "give a checkpoint directory"),
    ),
    "unsupported architecture": (
        lambda space: [f"{PATH}={space.model(architectures=['LlamaForCausalLM'])}"],
        (f"{PATH}=", "LlamaForCausalLM is not supported", "MiMoForCausalLM"),
    ),
    "model without MTP head": (
        lambda space: [f"{PATH}={space.model(num_nextn_predict_layers=None)}"],
        ("trainer.mtp.enabled=true: the model", "has no MTP head", "or trainer.mtp.enabled=false"),
    ),
    "model without the head's tensors": (
        lambda space: [f"{PATH}={space.model(tensors=('lm_head.weight',))}"],
        ("trainer.mtp.enabled=true: the model", "mtp_layers", "or trainer.mtp.enabled=false"),
    ),
    "model of another architecture with a head": (
        lambda space: [f"{PATH}={space.model(architectures=['Qwen2ForCausalLM'])}"],
        ("trainer.mtp.enabled=true: the model", "Qwen2ForCausalLM", "or trainer.mtp.enabled=false"),
    ),
    "broken weights": (
        lambda space: [f"{PATH}={broken_model(space)}"],
        (f"{PATH}=", "model.safetensors cannot be read", "copy it again"),
    ),
    "TP that does not divide the heads": (
        lambda _: ["trainer.policy.megatron_config.tensor_model_parallel_size=3"],
        ("tensor_model_parallel_size=3: must divide the model's 4 attention heads", "choose a divisor of 4"),
    ),
    "TP that does not divide the key-value heads": (
        lambda _: ["trainer.policy.megatron_config.tensor_model_parallel_size=4"],
        ("tensor_model_parallel_size=4: must divide the model's 2 key-value heads", "choose a divisor of 2"),
    ),
    "engine TP that does not divide the heads": (
        lambda _: [f"{ENGINE}.tensor_parallel_size=3"],
        (f"{ENGINE}.tensor_parallel_size=3: must divide the model's 4 attention heads", "choose a divisor of 4"),
    ),
    "head_dim the CPU engines cannot take": (
        lambda space: [f"{PATH}={space.model(head_dim=16)}"],
        (f"{PATH}=", "head_dim 16 is no multiple of 32", "use another model"),
    ),
    "longer than the model's positions": (
        lambda _: ["generator.sampling_params.max_generate_length=240"],
        ("generator.sampling_params.max_generate_length=240", "at most 256", "lower one"),
    ),
    "missing dataset": (
        lambda _: ["data.train_data=[nowhere.parquet]"],
        ("data.train_data=nowhere.parquet: no such file", "correct the path"),
    ),
    "missing validation dataset": (
        lambda _: ["data.val_data=[nowhere.jsonl]"],
        ("data.val_data=nowhere.jsonl: no such file", "correct the path"),
    ),
    "dataset of another kind": (
        lambda space: [f"data.train_data=[{space.file('rows.csv', b'prompt')}]"],
        ("data.train_data=", "rows.csv: must end in .parquet or .jsonl", "convert the file"),
    ),
    "empty dataset": (
        lambda space: [f"data.train_data=[{space.file('empty.jsonl', b'')}]"],
        ("data.train_data=", "empty.jsonl: has no rows", "at least one"),
    ),
    "unreadable parquet": (
        lambda space: [f"data.train_data=[{space.file('broken.parquet', b'PAR0')}]"],
        ("data.train_data=", "broken.parquet: cannot be read as parquet", "write it again"),
    ),
    "row without prompt": (
        lambda space: [f"data.train_data=[{space.rows(ROW, {'env_class': 'gsm8k'})}]"],
        ("data.train_data=", "row 2 has no field prompt", "add the chat messages"),
    ),
    "parquet without prompt": (
        lambda space: [f"data.train_data=[{parquet_without_prompt(space)}]"],
        ("data.train_data=", "row 1 has no field prompt", "add the chat messages"),
    ),
    "row with an unknown env_class": (
        lambda space: [f"data.train_data=[{space.rows(ROW, ROW | {'env_class': 'gsm9k'})}]"],
        ("row 2: env_class=gsm9k: must be one of", "gsm8k", "environment.custom"),
    ),
    "unknown env_class": (
        lambda _: ["environment.env_class=gsm9k"],
        ("environment.env_class=gsm9k: must be one of", "gsm8k", "environment.custom"),
    ),
    "environment that cannot be imported": (
        lambda _: ["environment.custom.mine='no_such_module:Env'"],
        ("environment.custom.mine=no_such_module:Env: cannot be imported", "PYTHONPATH"),
    ),
    "canary that is never due": (
        lambda _: ["trainer.canary.interval=0"],
        ("trainer.canary.interval=0: must be at least 1",),
    ),
    "canary without consequence": (
        lambda _: ["trainer.canary.on_mismatch=ignore"],
        ("trainer.canary.on_mismatch=ignore: must be error or warn",),
    ),
    "resuming from nowhere": (
        lambda _: ["trainer.resume_mode=from_path"],
        ("trainer.resume_path=None: goes with trainer.resume_mode=from_path", "set both or neither"),
    ),
    "path without resuming": (
        lambda space: [f"trainer.resume_path={space.root}"],
        ("goes with trainer.resume_mode=from_path, and that is None",),
    ),
    "checkpoint that is not there": (
        lambda space: ["trainer.resume_mode=from_path", f"trainer.resume_path={space.root / 'step_3'}"],
        ("step_3: no such directory", "name a checkpoint (RUN/checkpoints/step_N)"),
    ),
    "checkpoint that is none": (
        lambda space: ["trainer.resume_mode=from_path", f"trainer.resume_path={space.root}"],
        ("is no checkpoint of skyrl_spec (no checkpoint.json)",),
    ),
    "KV cache of nothing": (
        lambda _: [f"{ENGINE}.cpu_kvcache_space=0"],
        (f"{ENGINE}.cpu_kvcache_space=0.0: must be above 0",),
    ),
    "wandb without an account": (
        lambda _: ["trainer.logger=[console,wandb]"],
        ("trainer.logger=wandb: no account is set up", "WANDB_MODE=offline"),
    ),
    "run directory below a file": (
        lambda space: [f"trainer.run_dir={space.root / 'rows.jsonl' / 'run'}"],
        ("trainer.run_dir=", "rows.jsonl is a file", "choose another"),
    ),
    "DFlash on a model that vLLM cannot capture from": (
        lambda _: ["trainer.mtp.enabled=false", "trainer.dflash.enabled=true"],
        ("trainer.dflash.enabled=true: vLLM cannot hand the hidden states of a MiMoForCausalLM", "Qwen3ForCausalLM"),
    ),
    "target layers out of range": (
        lambda space: [*space.dflash(), "trainer.dflash.target_layer_ids=[1,8]"],
        ("trainer.dflash.target_layer_ids=[1, 8]: must be layers of the target, 0 to 7", "change it"),
    ),
    "target layers not unique": (
        lambda space: [*space.dflash(), "trainer.dflash.target_layer_ids=[1,4,4]"],
        ("trainer.dflash.target_layer_ids=[1, 4, 4]: must be ascending, each layer once", "change it"),
    ),
    "target too shallow": (
        lambda space: [*space.dflash(target={"num_hidden_layers": 5}), "trainer.dflash.num_layers=4"],
        ("trainer.dflash.num_layers=4: a target of 5 layers is too shallow", "lower it or set target_layer_ids"),
    ),
    "block of one": (
        lambda space: [*space.dflash(), "trainer.dflash.block_size=1"],
        ("trainer.dflash.block_size=1: must be at least 2", "change it"),
    ),
    "more draft tokens than a block has": (
        lambda space: [*space.dflash(space.draft()), "trainer.dflash.num_speculative_tokens=4"],
        ("trainer.dflash.num_speculative_tokens=4: must be below the block size 4", "lower it"),
    ),
    "no such draft": (
        lambda space: space.dflash(space.root / "nowhere"),
        ("trainer.dflash.path=", "nowhere: no such directory"),
    ),
    "a model in place of a draft": (
        lambda space: space.dflash(space.root / "model"),
        ("trainer.dflash.path=", "is a MiMoForCausalLM, not a DFlashDraftModel", "give a DFlash draft"),
    ),
    "draft of another width": (
        lambda space: space.dflash(space.draft(hidden_size=64)),
        ("trainer.dflash.path=", "its hidden_size 64 is not the target's 128"),
    ),
    "draft of another vocabulary": (
        lambda space: space.dflash(space.draft(vocab_size=64)),
        ("trainer.dflash.path=", "its vocab_size 64 is not the target's 32"),
    ),
    "draft of a deeper target": (
        lambda space: space.dflash(space.draft(num_target_layers=9)),
        ("trainer.dflash.path=", "for a target of 9 layers, not of 8"),
    ),
    "draft with too few positions": (
        lambda space: space.dflash(space.draft(max_position_embeddings=64)),
        ("generator.sampling_params.max_generate_length", "but the draft", "has 64; lower one"),
    ),
    "draft that is causal": (
        lambda space: space.dflash(space.draft(dflash_config=DRAFT_CONFIG["dflash_config"] | {"causal": True})),
        ("trainer.dflash.path=", "dflash_config.causal", "is not supported"),
    ),
    "draft without a tensor": (
        lambda space: space.dflash(space.draft(without="fc.weight")),
        ("trainer.dflash.path=", "has no tensor fc.weight", "copy it again"),
    ),
    "setting that contradicts the draft": (
        lambda space: [*space.dflash(space.draft()), "trainer.dflash.block_size=8"],
        ("trainer.dflash.block_size=8: the draft at trainer.dflash.path=", "has 4", "leave it null"),
    ),
    "TP that does not divide the draft": (
        lambda space: [
            *space.dflash(space.draft(num_key_value_heads=1)),
            "trainer.policy.megatron_config.tensor_model_parallel_size=2",
        ],
        ("tensor_model_parallel_size=2: must divide the draft's", "1 key-value heads", "choose a divisor"),
    ),
    "an engine with another draft": (
        lambda space: [*space.dflash(), f"{ENGINE}.speculative_config={{method: ngram, num_speculative_tokens: 3}}"],
        (f"{ENGINE}.speculative_config=", "must be of method dflash", "turn dflash off"),
    ),
    "shared GPUs on CPU": (
        lambda _: ["trainer.placement.colocate_all=true"],
        ("trainer.placement.colocate_all=true: shares GPUs", "trainer.placement.device=cpu", "set it false"),
    ),
    "ipc without shared GPUs": (
        lambda _: ["trainer.placement.device=cuda", f"{ENGINE}.weight_sync_backend=ipc"],
        (f"{ENGINE}.weight_sync_backend=ipc: ", "must be nccl", "trainer.placement.colocate_all=true", "leave it null"),
    ),
    "no GPU": (
        lambda _: ["trainer.placement.device=cuda", "trainer.measure_speedup=false"],
        ("trainer.placement.device=cuda: no CUDA device is visible", "set it to cpu"),
    ),
}


def test_the_workspace_itself_is_right(workspace: Workspace) -> None:
    """So that every line below is about its mistake and nothing else."""
    config = load_config(workspace.overrides)
    validate(config)
    preflight(config)


def test_sharing_halves_the_gpus_that_are_asked_for(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config([*workspace.overrides, "trainer.placement.device=cuda", f"{ENGINE}.num_engines=2"])
    config.trainer.placement.policy_num_gpus_per_node = 2
    with pytest.raises(ConfigError, match="2 policy workers and 2 GPUs of engines, but this machine has 2"):
        preflight(config)
    config.trainer.placement.colocate_all = True
    preflight(config)
    config.trainer.placement.policy_num_gpus_per_node = 3
    with pytest.raises(ConfigError, match=r"colocate_all=true: 3 policy workers, .* but this machine has 2 GPUs"):
        preflight(config)


# Whatever the machine has; tests/conftest.py sees to hub and accounts.
NOTHING = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_its_line(mistake: str, workspace: Workspace, tmp_path: Path) -> None:
    overrides, expected = MISTAKES[mistake]
    mark = uuid.uuid4().hex
    environment = NOTHING | {"HOME": str(tmp_path), "TEST_MARK": mark}
    done = run_command(["train", *workspace.overrides, *overrides(workspace)], tmp_path, environment)

    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("skyrl-spec: error: ")
    missing = [words for words in expected if words not in lines[0]]
    assert not missing, lines[0]
    assert done.stdout == ""
    assert processes_with(mark) == []
    assert not (workspace.root / "run").exists()


@pytest.mark.parametrize("mistake", ["unknown key", "wandb without an account"])
def test_the_line_comes_within_seconds(mistake: str, workspace: Workspace, tmp_path: Path) -> None:
    """A mistake seen first, and one seen last, at the command as a shell starts it."""
    overrides, expected = MISTAKES[mistake]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "skyrl_spec", "train", *workspace.overrides, *overrides(workspace)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | NOTHING | {"HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert expected[0] in done.stderr
    assert time.monotonic() - start < TIME_LIMIT_S


def processes_with(mark: str) -> list[str]:
    """Command lines of the processes that inherited the mark in their environment."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark:
                left.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left
