"""Tiny models of the MiMo architecture with random weights, exact computations on them, and engines that serve them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.actor import ActorHandle
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from skyrl_spec.config import SamplingConfig
from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine import EngineSettings
from skyrl_spec.types import Generation

# Odd on purpose: vLLM pads it.
VOCAB_SIZE = 97
HIDDEN_SIZE = 64
EOS_TOKEN = 1
PROMPT = [5, 17, 42, 8, 3]
MTP = {"method": "mtp", "num_speculative_tokens": 3}


def write_tiny_model(path: Path, seed: int, tied: bool = False) -> Path:
    """Random weights, drawn so that the next token depends mostly on the last one, and so that the head knows it."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0 if not tied else 0.25)
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.25)
    weights = dict(model.state_dict())
    layer = {name: torch.randn_like(tensor) * 0.05 for name, tensor in model.model.layers[0].state_dict().items()}
    layer["input_proj.weight"] = torch.cat([torch.randn(HIDDEN_SIZE, HIDDEN_SIZE) * 0.05, torch.eye(HIDDEN_SIZE)], dim=1)
    norms = ["token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm", "final_layernorm"]
    layer |= {f"{norm}.weight": 1 + 0.1 * torch.randn(HIDDEN_SIZE) for norm in norms}
    weights |= {f"model.mtp_layers.0.{name}": tensor for name, tensor in layer.items()}
    if tied:
        del weights["lm_head.weight"]
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    extra = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, "attention_bias": True}
    extra |= {"rope_theta": 10000.0, "dtype": "float32", "eos_token_id": EOS_TOKEN, "bos_token_id": None}
    (path / "config.json").write_text(json.dumps(config.to_dict() | extra | {"model_type": "qwen2"}))
    backend = Tokenizer(models.WordLevel({f"<{token}>": token for token in range(VOCAB_SIZE)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"<{EOS_TOKEN}>", unk_token="<0>").save_pretrained(path)
    return path


def split_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(target, draft) tensors of a tiny model."""
    weights = load_file(path / "model.safetensors")
    draft = {name: tensor for name, tensor in weights.items() if ".mtp_layers." in name}
    return {name: tensor for name, tensor in weights.items() if name not in draft}, draft


@torch.no_grad()
def exact_logprobs(path: Path, token_ids: list[list[int]], sampling: SamplingConfig) -> Tensor:
    """``[B, S, V]`` log-probs of the distribution to sample from after each token, in float64 from a HF forward."""
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(path)).eval()
    model.load_state_dict(split_weights(path)[0], strict=not model.config.tie_word_embeddings)
    logits = model(torch.tensor(token_ids)).logits.double() / (sampling.temperature or 1.0)
    if sampling.top_k > 0:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
    # A token stays if those ahead of it do not reach top_p yet.
    outside = ordered.cumsum(-1) - ordered >= sampling.top_p
    outside[..., 0] = False
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf).log_softmax(-1)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``w0`` and ``w1`` (unlike weights), and ``tied0`` and ``tied1``."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        write_tiny_model(root / f"w{seed}", seed)
        write_tiny_model(root / f"tied{seed}", seed, tied=True)
    return root


@pytest.fixture(scope="session")
def base_settings(models_dir: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(models_dir / "w0"),
        dtype="fp32",
        device="cpu",
        max_model_len=64,
        speculative_config=MTP,
        weight_sync_backend="ray",
        enforce_eager=True,
        num_threads=1,
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=1)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def start_engine(ray_cluster: None, base_settings: EngineSettings) -> Iterator[Callable[..., ActorHandle]]:
    """Starts an engine with changed settings, each in a process of its own."""
    actors = []

    def start(actor_class: Any = RolloutActor, args: tuple[Any, ...] = (), **changes: Any) -> ActorHandle:
        settings = replace(base_settings, **changes)
        actors.append(actor_class.options(**actor_options(settings)).remote(settings, *args))
        return actors[-1]

    yield start
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(scope="session")
def engine(start_engine: Callable[..., ActorHandle]) -> ActorHandle:
    """Serves ``w0`` with its MTP head; tests leave its weights as they are."""
    return start_engine()


def generate(
    engine: ActorHandle, prompts: list[list[int]], sampling: SamplingConfig, n: int = 1, seed: int | None = None
) -> list[list[Generation]]:
    return ray.get(engine.generate.remote(prompts, sampling, n, seed), timeout=300)
