"""Mistakes of users at the real command. Each gets one line and status 2, within seconds, and leaves no process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
from runs import ROOT
from safetensors.numpy import save_file

from skyrl_spec.checkpoint.folders import RECORD, begin, publish
from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.preflight import preflight
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.compose import load_config
from skyrl_spec.specs.dflash import dflash_tensor_shapes, parse_dflash_spec
from skyrl_spec.specs.model import SUPPORTED_ARCHITECTURES, parse_spec, tensor_shapes
from skyrl_spec.specs.mtp import mtp_tensor_shapes

ENGINE = "generator.inference_engine"
MEGATRON = "trainer.policy.megatron_config"
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
LATIN_ROW = '{"prompt": [{"role": "user", "content": "Grüße"}]}'.encode("latin-1")
ROW = {"prompt": [{"role": "user", "content": "1+1="}], "env_class": "gsm8k"}


@dataclass(frozen=True)
class Workspace:
    """A valid model directory and dataset, and overrides that name them."""

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

    def model(self, *, without: str | None = None, reshaped: str | None = None, **changes: Any) -> Path:
        """A model of zeros.

        ``changes`` of config.json; None removes an entry. ``without`` removes the tensors whose names contain it.
        """
        directory = self.root / f"model-{uuid.uuid4().hex[:8]}"
        directory.mkdir()
        config = {key: value for key, value in (MODEL_CONFIG | changes).items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))
        # Shapes must follow the changes that are valid.
        followed = ("num_hidden_layers", "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        sizes = {key: changes[key] for key in followed if key in changes}
        architecture = changes.get("architectures", MODEL_CONFIG["architectures"])
        spec = parse_spec(
            directory,
            MODEL_CONFIG
            | sizes
            | ({"architectures": architecture} if architecture[0] in SUPPORTED_ARCHITECTURES else {}),
        )
        shapes = tensor_shapes(spec) | mtp_tensor_shapes(spec)
        tensors = {
            name: np.zeros(shape, np.float32) for name, shape in shapes.items() if not (without and without in name)
        }
        if reshaped is not None:
            tensors[reshaped] = tensors[reshaped][1:]
        save_file(tensors, directory / "model.safetensors")
        return directory

    def dflash(self, path: Path | None = None, *, target: dict[str, Any] | None = None) -> list[str]:
        """Overrides for a DFlash draft on a Qwen3 model of eight layers. Without ``path`` it is from scratch."""
        of_target = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 8, "num_nextn_predict_layers": None}
        model = self.model(**(of_target | (target or {})))
        draft = "null" if path is None else str(path)
        return [
            f"{PATH}={model}",
            "trainer.mtp.enabled=false",
            "trainer.dflash.enabled=true",
            "trainer.dflash.num_layers=null",
            f"trainer.dflash.path={draft}",
        ]

    def mixture(self) -> list[str]:
        """Overrides for a mixture of four experts with a DFlash draft from scratch."""
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "model_type": "qwen3_moe"}
        return self.dflash(target={"architectures": ["Qwen3MoeForCausalLM"], **experts})

    def draft(self, *, without: str | None = None, reshaped: str | None = None, **changes: Any) -> Path:
        """The directory of a DFlash draft of zeros."""
        directory = self.root / f"draft-{uuid.uuid4().hex[:8]}"
        directory.mkdir()
        config = DRAFT_CONFIG | changes
        (directory / "config.json").write_text(json.dumps(config))
        shapes = dflash_tensor_shapes(parse_dflash_spec(directory, DRAFT_CONFIG))
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name != without}
        if reshaped is not None:
            tensors[reshaped] = tensors[reshaped][1:]
        save_file(tensors, directory / "model.safetensors")
        return directory

    def real(self) -> list[str]:
        """Overrides that name the shipped model and data, for mistakes that only its tokenizer finds."""
        example = ROOT / "examples" / "arithmetic_mtp"
        return [f"{PATH}={example / 'model'}", f"data.val_data=[{example / 'data' / 'validation.jsonl'}]"]

    def real_model(self, *, without: str | None = None, **tokenizer_config: Any) -> list[str]:
        """Overrides that name a copy of the shipped model with a changed tokenizer."""
        directory = self.root / f"model-{uuid.uuid4().hex[:8]}"
        shutil.copytree(ROOT / "examples" / "arithmetic_mtp" / "model", directory)
        if without is not None:
            (directory / without).unlink()
        if tokenizer_config:
            file = directory / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | tokenizer_config))
        return [*self.real(), f"{PATH}={directory}"]

    def checkpoint(self, *, part: str = "policy", dtypes: tuple[str, ...] = ("fp32",), **record: Any) -> Path:
        """A checkpoint of the workspace's model that has a record but no tensors."""
        directory = self.root / f"run-{uuid.uuid4().hex[:8]}" / "checkpoints" / "step_3"
        begin(directory)
        spec = parse_spec(self.root / "model", MODEL_CONFIG)
        shapes = {name: list(shape) for name, shape in tensor_shapes(spec).items()}
        parts = {part: {"dtypes": list(dtypes), "shapes": shapes}}
        extra = {"trainer": {"step": 3}}
        publish(directory, {"layout": {"tp": 1, "dp": 1}, "parts": parts, "extra": extra} | record)
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


def truncated_model(space: Workspace) -> Path:
    directory = space.model()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return directory


def resume(path: Path) -> list[str]:
    return ["trainer.resume_mode=from_path", f"trainer.resume_path={path}"]


def incomplete_checkpoint(space: Workspace) -> Path:
    directory = space.checkpoint()
    record = json.loads((directory / RECORD).read_text())
    (directory / RECORD).write_text(json.dumps(record | {"files": {"__0_0.distcp": 100}}))
    return directory


def garbled_checkpoint(space: Workspace) -> Path:
    directory = space.checkpoint()
    (directory / RECORD).write_bytes(b"\x00" * 100)
    return directory


def broken_tokenizer(space: Workspace) -> list[str]:
    *rest, override = space.real_model()
    (Path(override.partition("=")[2]) / "tokenizer.json").write_text("{")
    return [*rest, override]


def larger_tokenizer(space: Workspace) -> list[str]:
    *rest, override = space.real_model()
    file = Path(override.partition("=")[2]) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append(last | {"id": 5000, "content": "<|more|>"})
    file.write_text(json.dumps(tokenizer))
    return [*rest, override]


def parquet_without_prompt(space: Workspace) -> Path:
    file = space.root / "no_prompt.parquet"
    pq.write_table(pa.table({"question": ["1+1="]}), file)
    return file


# The overrides of a mistake, and texts that its line must contain: setting, value, what is allowed, and the fix.
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
        ("trainer.train_batch_size: Value 'many'", "give an integer"),
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
        (f"{PATH}=someone/some-model: is not a local directory and was not found", "check the network"),
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
        lambda space: [f"{PATH}={space.model(without='mtp_layers')}"],
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
        ("tensor_model_parallel_size=3: must divide the model's 4 attention heads", "set a divisor of 4"),
    ),
    "more stages than layers": (
        lambda _: ["trainer.policy.megatron_config.pipeline_model_parallel_size=2"],
        ("pipeline_model_parallel_size=2: the model has fewer layers, 1, and every stage needs one", "lower it"),
    ),
    "TP that does not divide the key-value heads": (
        lambda _: ["trainer.policy.megatron_config.tensor_model_parallel_size=4"],
        ("tensor_model_parallel_size=4: must divide the model's 2 key-value heads", "set a divisor of 2"),
    ),
    "experts of a dense model": (
        lambda _: [f"{MEGATRON}.expert_model_parallel_size=2"],
        (f"{MEGATRON}.expert_model_parallel_size=2: must be 1, because ", "has no experts", "use a Qwen3-MoE model"),
    ),
    "EP that does not divide the experts": (
        lambda space: [*space.mixture(), f"{MEGATRON}.expert_model_parallel_size=8"],
        (f"{MEGATRON}.expert_model_parallel_size=8: must divide the model's 4 experts", "set a divisor of 4"),
    ),
    "expert TP that does not divide the columns": (
        lambda space: [*space.mixture(), f"{MEGATRON}.expert_tensor_parallel_size=64"],
        (f"{MEGATRON}.expert_tensor_parallel_size=64: must divide the model's 32 columns of an expert",),
    ),
    "experts without sequence parallelism": (
        lambda space: [
            *space.mixture(),
            f"{MEGATRON}.tensor_model_parallel_size=2",
            f"{MEGATRON}.sequence_parallel=false",
        ],
        (f"{MEGATRON}.sequence_parallel=false: must be null or true for a model with experts", "set it to null"),
    ),
    "experts of an engine for a dense model": (
        lambda _: ["trainer.algorithm.router_replay=true"],
        ("trainer.algorithm.router_replay=true: must be false, because ", "has no experts", "set it to false"),
    ),
    "MTP head of a mixture": (
        lambda space: [*space.mixture(), "trainer.mtp.enabled=true", "trainer.dflash.enabled=false"],
        ("trainer.mtp.enabled=true: the model ", "has no MTP head", "use a model with an MTP head"),
    ),
    "engine TP that does not divide the heads": (
        lambda _: [f"{ENGINE}.tensor_parallel_size=3"],
        (f"{ENGINE}.tensor_parallel_size=3: must divide the model's 4 attention heads", "set a divisor of 4"),
    ),
    "head_dim the CPU engines cannot take": (
        lambda space: [f"{PATH}={space.model(head_dim=16)}"],
        (f"{PATH}=", "head_dim 16 must be a multiple of 32", "use another model"),
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
    "SkyRL's place for the number of environments": (
        lambda _: ["+environment.skyrl_gym.max_env_workers=32"],
        ("environment.skyrl_gym.max_env_workers=32: must be the settings of an environment", "max_env_workers"),
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
        ("trainer.resume_path=None: is used with trainer.resume_mode=from_path only", "set both or neither"),
    ),
    "path without resuming": (
        lambda space: [f"trainer.resume_path={space.root}"],
        ("is used with trainer.resume_mode=from_path only", "the mode is None"),
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
        ("trainer.logger=[wandb]: wandb has no key", "WANDB_MODE=offline"),
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
        (
            "trainer.dflash.path=",
            "is a MiMoForCausalLM, but must be a DFlashDraftModel",
            "give the directory of a DFlash draft",
        ),
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
    "collectives that outlast a call": (
        lambda _: ["trainer.placement.worker_timeout_s=60", "trainer.placement.collective_timeout_s=61"],
        ("trainer.placement.collective_timeout_s=61", "at most trainer.placement.worker_timeout_s=60", "lower it"),
    ),
    "shared GPUs on CPU": (
        lambda _: ["trainer.placement.colocate_all=true"],
        ("trainer.placement.colocate_all=true: needs trainer.placement.device=cuda", "set it to false"),
    ),
    "ipc without shared GPUs": (
        lambda _: ["trainer.placement.device=cuda", f"{ENGINE}.weight_sync_backend=ipc"],
        (f"{ENGINE}.weight_sync_backend=ipc: ", "must be nccl", "trainer.placement.colocate_all=true", "leave it null"),
    ),
    "dtype of its own": (
        lambda _: ["trainer.policy.megatron_config.dtype=fp16"],
        ("trainer.policy.megatron_config.dtype=fp16: must be fp32 or bf16", "set one of these"),
    ),
    "sampling at temperature 0": (
        lambda _: ["generator.sampling_params.temperature=0"],
        ("generator.sampling_params.temperature=0.0: must be above 0",),
    ),
    "a number that is none": (
        lambda _: ["trainer.policy.optimizer_config.lr=nan"],
        ("trainer.policy.optimizer_config.lr=nan: must be finite and at least 0",),
    ),
    "no nucleus": (
        lambda _: ["generator.sampling_params.top_p=0"],
        ("generator.sampling_params.top_p=0.0: must be above 0 and at most 1",),
    ),
    "top-k of none": (
        lambda _: ["generator.sampling_params.top_k=0"],
        ("generator.sampling_params.top_k=0: must be at least 1, or -1 for all tokens",),
    ),
    "min-p with a draft": (
        lambda _: ["generator.sampling_params.min_p=0.1"],
        ("generator.sampling_params.min_p=0.1: vLLM does not apply min_p to drafted tokens",),
    ),
    "one sample a prompt": (
        lambda _: ["generator.n_samples_per_prompt=1"],
        ("generator.n_samples_per_prompt=1: must be at least 2", "raise it"),
    ),
    "batches that do not divide": (
        lambda _: ["trainer.policy_mini_batch_size=3"],
        ("trainer.train_batch_size=16: must be a multiple of trainer.policy_mini_batch_size=3",),
    ),
    "learning rate that rises": (
        lambda _: ["trainer.mtp.optimizer_config.min_lr=1"],
        ("trainer.mtp.optimizer_config.min_lr=1.0: must be at most trainer.mtp.optimizer_config.lr", "lower it"),
    ),
    "three betas": (
        lambda _: ["trainer.policy.optimizer_config.adam_betas=[0.9,0.9,0.9]"],
        ("adam_betas=[0.9, 0.9, 0.9]: must be two numbers",),
    ),
    "a list that is none": (
        lambda _: ["data.train_data=rows.jsonl"],
        ("data.train_data=rows.jsonl: must be a list; write 'data.train_data=[rows.jsonl]'",),
    ),
    "a section for a value": (
        lambda _: ["trainer.mtp=true"],
        ("trainer.mtp=True: trainer.mtp is a section; set one of its settings, as in trainer.mtp.enabled=...",),
    ),
    "words that are no override": (
        lambda _: ["trainer.epochs"],
        ("cannot read override 'trainer.epochs'; write KEY=VALUE",),
    ),
    "a sweep": (
        lambda _: ["trainer.seed=1,2"],
        ("cannot use override 'trainer.seed=1,2': a setting takes exactly one value",),
    ),
    "a value that is missing": (
        lambda _: ["trainer.run_dir=???"],
        ("trainer.run_dir=???: hydra reads ??? as a missing value",),
    ),
    "an engine argument that is ours": (
        lambda _: [f"{ENGINE}.engine_init_kwargs={{max_model_len: 4096}}"],
        (f"{ENGINE}.engine_init_kwargs.max_model_len=4096: skyrl_spec sets this argument itself", "remove it"),
    ),
    "exports between checkpoints": (
        lambda _: ["trainer.ckpt_interval=4", "trainer.hf_save_interval=6"],
        ("trainer.hf_save_interval=6: must be a multiple of trainer.ckpt_interval=4",),
    ),
    "a share above one": (
        lambda _: ["environment.max_failed_share=2"],
        ("environment.max_failed_share=2.0: must be at least 0 and at most 1",),
    ),
    "a logger that there is not": (
        lambda _: ["trainer.logger=[console,mlflow]"],
        ("trainer.logger=['console', 'mlflow']: mlflow is not one of console, wandb",),
    ),
    "a folder that cannot be written": (
        lambda _: ["trainer.run_dir=/proc/run"],
        ("trainer.run_dir=/proc/run: cannot be written to", "choose another directory"),
    ),
    "truncated weights": (
        lambda space: [f"{PATH}={truncated_model(space)}"],
        (f"{PATH}=", "model.safetensors cannot be read", "copy it again"),
    ),
    "weights that are not all there": (
        lambda space: [f"{PATH}={space.model(without='layers.0.mlp.up_proj')}"],
        (f"{PATH}=", "has no tensor model.layers.0.mlp.up_proj.weight", "copy it again"),
    ),
    "weights of another shape": (
        lambda space: [f"{PATH}={space.model(reshaped='model.embed_tokens.weight')}"],
        (f"{PATH}=", "model.embed_tokens.weight has shape [31, 128], but config.json says [32, 128]"),
    ),
    "head of another shape": (
        lambda space: [f"{PATH}={space.model(reshaped='model.mtp_layers.0.input_proj.weight')}"],
        (f"{PATH}=", "input_proj.weight has shape [127, 256], but config.json says [128, 256]"),
    ),
    "draft of another shape": (
        lambda space: space.dflash(space.draft(reshaped="fc.weight")),
        ("trainer.dflash.path=", "fc.weight has shape [127, 256], but config.json says [128, 256]"),
    ),
    "config.json with a size that is none": (
        lambda space: [f"{PATH}={space.model(hidden_size='128')}"],
        (f"{PATH}=", "hidden_size='128' in config.json must be an integer of at least 1", "copy it again"),
    ),
    "RoPE that is scaled": (
        lambda space: [f"{PATH}={space.model(rope_scaling={'rope_type': 'yarn', 'factor': 4.0})}"],
        (f"{PATH}=", "RoPE scaling", "is not supported", "use a model with plain RoPE"),
    ),
    "model without a tokenizer": (
        lambda space: [f"{PATH}={space.root / 'model'}"],
        (f"{PATH}=", "has no tokenizer", "copy the files of the tokenizer"),
    ),
    "broken tokenizer": (
        broken_tokenizer,
        (f"{PATH}=", "its tokenizer cannot be loaded", "copy its files again"),
    ),
    "tokenizer of a larger model": (
        larger_tokenizer,
        (
            f"{PATH}=",
            "its tokenizer has token 104, but the last token of the model is",
            "use the tokenizer of this model",
        ),
    ),
    "tokenizer without chat template": (
        lambda space: space.real_model(without="chat_template.jinja"),
        (f"{PATH}=", "its tokenizer has no chat template", "add one to tokenizer_config.json"),
    ),
    "no prompt that fits": (
        lambda space: [*space.real(), "trainer.max_prompt_length=2"],
        ("trainer.max_prompt_length=2: all 2 prompts of data.train_data are longer; raise it",),
    ),
    "a row that its environment cannot use": (
        lambda space: space.real(),
        ("row ", "environment gsm8k cannot be made from its fields", "fix the data"),
    ),
    "rows that are no UTF-8": (
        lambda space: [f"data.train_data=[{space.file('latin.jsonl', LATIN_ROW)}]"],
        ("data.train_data=", "latin.jsonl: row 1 is not JSON in UTF-8", "fix the row"),
    ),
    "a prompt that is text": (
        lambda space: [f"data.train_data=[{space.rows(ROW, ROW | {'prompt': '1+1='})}]"],
        ("data.train_data=", "row 2: prompt must be a list of {role, content} texts, but is '1+1='", "rewrite it"),
    ),
    "ids that are there twice": (
        lambda space: [f"data.train_data=[{space.rows(*[ROW | {'extra_info': {'index': 7}}] * 2)}]"],
        ("data.train_data=", "row 2 has the same extra_info.index as row 1 (7)", "renumber the rows"),
    ),
    "a file that is named twice": (
        lambda space: [f"data.train_data=[{space.root / 'rows.jsonl'},{space.root / 'rows.jsonl'}]"],
        (
            "data.train_data=",
            "rows.jsonl: is named twice",
        ),
    ),
    "checkpoint that is not complete": (
        lambda space: resume(incomplete_checkpoint(space)),
        ("trainer.resume_path=", "__0_0.distcp is missing", "take another checkpoint"),
    ),
    "checkpoint whose record is garbled": (
        lambda space: resume(garbled_checkpoint(space)),
        ("trainer.resume_path=", "checkpoint.json cannot be read", "take another checkpoint"),
    ),
    "checkpoint of another version": (
        lambda space: resume(space.checkpoint(format=99)),
        ("trainer.resume_path=", "checkpoint.json has format 99, this version reads 1"),
    ),
    "checkpoint of another dtype": (
        lambda space: resume(space.checkpoint(dtypes=("bf16",))),
        ("trainer.policy.megatron_config.dtype=fp32: trainer.resume_path=", "was trained in bf16", "set it to bf16"),
    ),
    "checkpoint of another model": (
        lambda space: [*resume(space.checkpoint()), *space.real()],
        (f"{PATH}=", "belongs to another model", "has shape [32, 128] there", "set the model that it was trained from"),
    ),
    "checkpoint of a warm-up": (
        lambda space: resume(space.checkpoint(part="draft")),
        ("trainer.resume_path=", "holds no policy", "warm-up"),
    ),
    "no GPU": (
        lambda _: ["trainer.placement.device=cuda", "trainer.measure_speedup=false"],
        ("trainer.placement.device=cuda: no CUDA device is visible", "set it to cpu"),
    ),
}


def test_the_workspace_itself_is_right(workspace: Workspace) -> None:
    """Otherwise a line below could be about something else than its mistake."""
    config = load_config(workspace.overrides)
    validate(config)
    preflight(config)


def test_sharing_halves_the_gpus_that_are_asked_for(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config([*workspace.overrides, "trainer.placement.device=cuda", f"{ENGINE}.num_engines=2"])
    config.trainer.placement.policy_num_gpus_per_node = 2
    with pytest.raises(
        ConfigError,
        match=r"2 policy workers and 2 GPUs .* machine has 2; lower trainer\.placement\.policy_num_gpus_per_node",
    ):
        preflight(config)
    config.trainer.placement.colocate_all = True
    preflight(config)
    config.trainer.placement.policy_num_gpus_per_node = 3
    with pytest.raises(ConfigError, match=r"3 policy workers, .* need 3 GPUs, but this machine has 2;"):
        preflight(config)


# No GPU, whatever the machine has. tests/conftest.py disables hub and accounts.
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
def test_the_line_comes_before_heavy_packages_load(mistake: str, workspace: Workspace, tmp_path: Path) -> None:
    """The first and the last mistake to be found, at the command as a shell starts it."""
    overrides, expected = MISTAKES[mistake]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "skyrl_spec", "train", *workspace.overrides, *overrides(workspace)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | NOTHING | {"HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert expected[0] in line
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "skyrl_spec.settings.compose" in imported, "no imports are listed"
    assert imported.isdisjoint({"torch", "vllm", "megatron", "ray"})


def processes_with(mark: str) -> list[str]:
    """Command lines of processes that inherited the mark in their environment."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark:
                left.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left
