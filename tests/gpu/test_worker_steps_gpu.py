"""Training steps, the attentions, and a weight sync on CUDA devices in bf16.

Every function takes the device, so what is run here is what the CPU tests run: PolicyTrainer, its actors, vLLM.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_batch, make_config, write_checkpoint, write_model
from torch import Tensor

from skyrl_spec.controller.placement import start_actors
from skyrl_spec.drafts.chain_attention import chain_attention
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.models.attention import SdpaAttention
from skyrl_spec.models.policy import document_mask, transformer_config
from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine import EngineSettings
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.specs.model import load_spec
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import SpecCounters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two CUDA devices; there are {torch.cuda.device_count()}"
)
TENSOR_PARALLEL_SIZES = [1, pytest.param(2, marks=needs_two)]
DRAFTS = ["mtp", "dflash"]
NUM_STEPS = 3


def bf16_checkpoint(path: Path, draft: str = "mtp") -> Path:
    """A tiny checkpoint of numbers that bf16 holds exactly, so that fp32 and bf16 train the same weights."""
    write_model(path, draft)
    for file in path.parent.glob("*/model.safetensors"):
        save_file({name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}, file)
    return path


def _train(rank: int, device: str, path: Path, folder: Path, tp: int, options: dict[str, Any]) -> None:
    # cuBLAS reads it when the process first uses the device. Ops that have no deterministic form only warn.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    ranks = parallel.initialize(
        rank=rank,
        world_size=tp,
        tensor_parallel_size=tp,
        device=torch.device(device, rank) if device == "cuda" else torch.device(device),
        store=torch.distributed.FileStore(f"{folder}/store", tp),
        timeout_s=120.0,
    )
    trainer = PolicyTrainer(make_config(path, tp=tp, **options), load_spec(str(path)), ranks, total_optimizer_steps=10)
    modules = {"policy": trainer.model} | ({"draft": trainer.draft.draft.module} if trainer.draft is not None else {})
    record: dict[str, Any] = {"metrics": [], "gradients": []}
    for step in range(NUM_STEPS):
        record["metrics"].append(values(trainer.train_mini_batch(make_batch(seed=step)).metrics))
        # The buffer still holds what the optimizer used: summed and clipped.
        record["gradients"].append({which: _copy(module, "main_grad") for which, module in modules.items()})
    record["weights"] = {which: _copy(module, "data") for which, module in modules.items()}
    torch.save(record, folder / f"rank{rank}.pt")
    parallel.shutdown()


def _copy(module: torch.nn.Module, attribute: str) -> dict[str, Tensor]:
    return {name: getattr(parameter, attribute).cpu().clone() for name, parameter in module.named_parameters()}


def train(device: str, path: Path, folder: Path, *, tp: int = 1, **options: Any) -> list[dict[str, Any]]:
    """Three mini-batches on fresh processes; what each rank has afterwards."""
    folder.mkdir()
    mp.spawn(_train, args=(device, path, folder, tp, options), nprocs=tp)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(tp)]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check_steps(device: str, folder: Path, tp: int, draft: str) -> None:
    path = bf16_checkpoint(folder / "model", draft)
    (reference,) = train("cpu", path, folder / "reference", dtype="fp32", draft=draft)
    records = train(device, path, folder / "bf16", tp=tp, dtype="bf16", draft=draft)
    for record in records:
        for metrics in record["metrics"]:
            assert all(math.isfinite(value) for value in metrics.values()), metrics
        # The first step has the same weights on both sides. Hidden states are rounded to 2^-9 of themselves; losses
        # and norms average over that (with bf16 on CPU: 3e-5 in the losses, 4e-3 in the norms, 2e-2 in a gradient).
        got, wanted = record["metrics"][0], reference["metrics"][0]
        assert got["policy/policy_loss"] == pytest.approx(wanted["policy/policy_loss"], rel=2e-3)
        assert got["policy/entropy"] == pytest.approx(wanted["policy/entropy"], rel=2e-3)
        assert got["draft/loss"] == pytest.approx(wanted["draft/loss"], rel=2e-3)
        for which in ("policy", "draft"):
            assert got[f"{which}/grad_norm"] == pytest.approx(wanted[f"{which}/grad_norm"], rel=2e-2)
        # The later steps train weights of their own.
        assert record["metrics"][-1]["draft/loss"] == pytest.approx(reference["metrics"][-1]["draft/loss"], rel=5e-3)
    if tp == 1:
        for which, gradients in reference["gradients"][0].items():
            for name, gradient in gradients.items():
                assert relative_error(records[0]["gradients"][0][which][name], gradient) < 5e-2, (which, name)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tp", TENSOR_PARALLEL_SIZES)
def test_three_bf16_steps_against_fp32_on_cpu(tmp_path: Path, tp: int, draft: str) -> None:
    check_steps("cuda", tmp_path, tp, draft)


def check_isolation(device: str, folder: Path, tp: int, draft: str) -> None:
    path = write_model(folder / "model", draft)
    with_draft = train(device, path, folder / "on", tp=tp, dtype="bf16", draft=draft)
    without = train(device, path, folder / "off", tp=tp, dtype="bf16", draft=None)
    for on, off in zip(with_draft, without, strict=True):
        for step in range(NUM_STEPS):
            assert on["gradients"][step]["policy"].keys() == off["gradients"][step]["policy"].keys()
            for name, gradient in off["gradients"][step]["policy"].items():
                assert torch.equal(on["gradients"][step]["policy"][name], gradient), (step, name)
            # Losses and the grad norm, to the last bit.
            assert {name: on["metrics"][step][name] for name in off["metrics"][step]} == off["metrics"][step]
            assert on["metrics"][step]["policy/grad_norm"] > 0.01, "clipping was to be active"
        for name, weight in off["weights"]["policy"].items():
            assert torch.equal(on["weights"]["policy"][name], weight), name
        for name, gradient in on["gradients"][-1]["draft"].items():
            assert gradient.abs().max() > 0, f"the draft does not train: {name}"


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tp", TENSOR_PARALLEL_SIZES)
def test_the_draft_does_not_change_a_bit_of_the_policy(tmp_path: Path, tp: int, draft: str) -> None:
    check_isolation("cuda", tmp_path, tp, draft)


NUM_DEPTHS, SEQ_LEN, BATCH, HEADS, GROUPS, HEAD_DIM = 3, 70, 2, 4, 2, 32


def segment_ids(packed: bool) -> Tensor:
    """``[B, S]``: a document a row, or three of them and padding."""
    lengths = (20, 13, 30, 7) if packed else (SEQ_LEN,)
    ids = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])
    return torch.where(ids > 3, 0, ids).expand(BATCH, SEQ_LEN)


def causal(folder: Path) -> Callable[..., Tensor]:
    """Megatron's core attention of the trunk, on the last depth's keys."""
    path = write_checkpoint(folder / "model")
    megatron = make_config(path).trainer.policy.megatron_config
    attention = SdpaAttention(transformer_config(load_spec(str(path)), megatron, torch.device("cpu")), 1)
    return lambda query, keys, values, mask: attention(query, keys[-1], values[-1], mask)


def chained(_folder: Path) -> Callable[..., Tensor]:
    return lambda query, keys, values, mask: chain_attention(query, keys, values, mask, HEAD_DIM**-0.5)


def check_attention(device: str, attend: Callable[..., Tensor], packed: bool) -> None:
    """Output and gradients in bf16 on ``device`` against fp32 on CPU, from the same (rounded) numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEQ_LEN, BATCH, HEADS, HEAD_DIM), *[(SEQ_LEN, BATCH, GROUPS, HEAD_DIM)] * (2 * NUM_DEPTHS)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    upstream = torch.randn(SEQ_LEN, BATCH, HEADS * HEAD_DIM, generator=generator).bfloat16()

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        mask = document_mask(segment_ids(packed).to(device))
        out = attend(leaves[0], leaves[1 : 1 + NUM_DEPTHS], leaves[1 + NUM_DEPTHS :], mask)
        grads = torch.autograd.grad(out, leaves, upstream.to(device, dtype), allow_unused=True)
        return [tensor.cpu() for tensor in (out, *grads) if tensor is not None]

    got, wanted = run(device, torch.bfloat16), run("cpu", torch.float32)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        # Each rounding is 2^-9; scores, probabilities and the output are rounded in turn.
        assert relative_error(mine, theirs) < 1e-2


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("build", [causal, chained])
def test_attention_bf16_against_fp32_on_cpu(
    tmp_path: Path, build: Callable[[Path], Callable[..., Tensor]], packed: bool
) -> None:
    check_attention("cuda", build(tmp_path), packed)


PROMPTS = ([9], [3, 4, 5, 6, 7], list(range(10, 40)))
GREEDY = SamplingConfig(temperature=0.0, max_generate_length=24)


class Answers(NamedTuple):
    """Greedy tokens and log-probs of every prompt, and what the draft did meanwhile."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    counters: SpecCounters


def ask(engine: Any) -> Answers:
    """A prompt at a time, so that what is in a batch does not vary."""
    before: SpecCounters = ray.get(engine.spec_counters.remote(), timeout=300)
    generations = [ray.get(engine.generate.remote([prompt], GREEDY, 1, 0), timeout=300)[0][0] for prompt in PROMPTS]
    return Answers(
        [generation.token_ids for generation in generations],
        [generation.logprobs for generation in generations],
        ray.get(engine.spec_counters.remote()) - before,
    )


def ask_around_a_sync(config: Config, settings: EngineSettings, exported: Path) -> tuple[Answers, list[Answers]]:
    """Answers of an engine before all got the weights of ten training steps, and of each after; exports them too."""
    engines, policy = start_actors(config, settings, total_optimizer_steps=10)
    old = ask(engines.handles[0])
    for _ in range(10):
        policy.train_mini_batch(make_batch(seed=0))
    sync = WeightSync(policy, engines, backend=settings.weight_sync_backend, components=["policy", "draft"])
    assert sync.sync() > 0
    synced = [ask(engine) for engine in engines.handles]
    policy.save_hf(exported)
    engines.shutdown()
    policy.shutdown()
    return old, synced


def check_sync(device: str, folder: Path, backend: str, num_shared: int = 0) -> None:
    """Engines that got trained weights from workers answer, and draft, like one that is built from them.

    With ``num_shared`` there are as many tensor-parallel workers, and an engine on the GPU of each.
    """
    config = make_config(bf16_checkpoint(folder / "model"), dtype="bf16", tp=max(1, num_shared))
    config.trainer.placement.device = device
    config.trainer.placement.colocate_all = num_shared > 0
    config.generator.inference_engine.num_engines = max(1, num_shared)
    config.trainer.policy.optimizer_config.lr = config.trainer.mtp.optimizer_config.lr = 1e-2
    settings = EngineSettings(
        model_path=config.trainer.policy.model.path,
        device=device,
        max_model_len=64,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": NUM_DEPTHS},
        weight_sync_backend=backend,
        num_threads=1 if device == "cpu" else None,
    )
    old, answers = ask_around_a_sync(config, settings, folder / "trained")
    built = replace(settings, model_path=str(folder / "trained"))
    actor_class: Any = RolloutActor
    fresh_engine = actor_class.options(**actor_options(built)).remote(built)
    fresh = ask(fresh_engine)
    ray.kill(fresh_engine)
    for synced in answers:
        assert synced.token_ids == fresh.token_ids != old.token_ids
        # A stale draft would leave the tokens right and be seen here alone.
        assert synced.counters == fresh.counters
        assert synced.counters.num_accepted_tokens > 0, "drafts of which none is accepted tell nothing"
        for mine, theirs in zip(synced.logprobs, fresh.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    ("backend", "num_shared"),
    [pytest.param("nccl", 0, marks=needs_two), ("ipc", 1), pytest.param("ipc", 2, marks=needs_two)],
)
def test_a_synced_engine_equals_a_fresh_one(tmp_path: Path, ray_cluster: None, backend: str, num_shared: int) -> None:
    """``nccl`` from another GPU, ``ipc`` on the GPU that worker and engine share."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        pytest.skip("needs the vllm package built for CUDA; the one installed is for another device")
    check_sync("cuda", tmp_path, backend, num_shared)
