"""Checks of training steps: against a CPU, with and without draft, recompute, distributed optimizer, long rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu_check import Check, Figure, apart, relative_error
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    EXPERTS_PER_TOKEN,
    NUM_EXPERTS,
    batch_of_lengths,
    make_batch,
    make_config,
    write_model,
)
from torch import Tensor

from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

NUM_STEPS = 3
DRAFTS = ("mtp", "dflash")
# A mixture of experts with a DFlash draft, in place of a draft's name.
MIXTURE = "mixture"
# Rounding to bf16 is 2^-9. Losses and norms average over it: with bf16 on a CPU 3e-5 of a loss, 4e-3 of a norm, 2e-2
# of a gradient.
LOSS_LIMIT, LATER_LOSS_LIMIT, NORM_LIMIT, GRADIENT_LIMIT = 2e-3, 5e-3, 2e-2, 5e-2
# A rounded sum of squares changes a clipped gradient by 1e-7, and rounds a bf16 weight here and there otherwise.
DISTRIBUTED_LIMIT = 1e-4
LOSSES = ("policy/policy_loss", "policy/entropy", "draft/loss")
NUM_LAYERS = 2


@dataclass(frozen=True)
class Setup:
    """A trainer to build, and what it trains on. ``long_rows``: length of the rows; 0: rows of a few tokens.

    ``tp`` ranks, each on a device of its own if ``device`` is "cuda".
    """

    device: str
    tp: int = 1
    dtype: str = "bf16"
    # None: none. ``MIXTURE``: DFlash, and tokens go to given experts, because rounding would send some elsewhere.
    draft: str | None = "mtp"
    recompute: str | None = None
    distributed: bool = False
    long_rows: int = 0
    # Whether all that can go to host memory goes there after every step.
    offloads: bool = False
    num_steps: int = NUM_STEPS


@dataclass(frozen=True)
class Record:
    """Metrics and gradients (after clipping) of every step, and the final weights, by component and name."""

    metrics: list[dict[str, float]]
    gradients: list[dict[str, dict[str, Tensor]]]
    weights: dict[str, dict[str, Tensor]]


def train(setup: Setup, path: Path, rank: int = 0, store: dist.Store | None = None) -> Record:
    """The record of a rank's trainer in this process, with deterministic kernels."""
    # cuBLAS reads it when the process first uses the device. Operations without a deterministic form only warn.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    trainer = build(setup, path, rank, dist.HashStore() if store is None else store)
    modules = {"policy": trainer.model} | ({"draft": trainer.draft.draft.module} if trainer.draft is not None else {})
    metrics, gradients = [], []
    for step in range(setup.num_steps):
        batch = make_long_batch(step, setup.long_rows) if setup.long_rows else make_batch(seed=step)
        batch = batch if trainer.spec.experts is None else with_experts(batch, seed=step)
        metrics.append(values(trainer.train_mini_batch(batch).metrics))
        # The buffer still holds what the optimizer used.
        gradients.append({component: _copies(module, "main_grad") for component, module in modules.items()})
        trainer.offload.training_state()
        trainer.offload.weights()
    trainer.offload.require(trainer.model)
    return Record(metrics, gradients, {component: _copies(module, "data") for component, module in modules.items()})


def build(setup: Setup, path: Path, rank: int, store: dist.Store) -> PolicyTrainer:
    """A rank's trainer. The ranks meet in ``store``."""
    ranks = parallel.initialize(
        rank=rank,
        world_size=setup.tp,
        tensor_parallel_size=setup.tp,
        device=torch.device(setup.device, rank) if setup.device == "cuda" else torch.device(setup.device),
        store=store,
        timeout_s=120.0,
    )
    draft = "dflash" if setup.draft == MIXTURE else setup.draft
    config = make_config(path, tp=setup.tp, dtype=setup.dtype, draft=draft, distributed=setup.distributed)
    spec = load_spec(str(path))
    config.trainer.algorithm.router_replay = spec.experts is not None
    config.trainer.policy.megatron_config.recompute_granularity = setup.recompute
    # The recompute of a norm changes the rounding of a sum.
    config.trainer.policy.megatron_config.recompute_modules = ["mlp"]
    config.trainer.policy.megatron_config.cpu_offload = setup.offloads
    for part in (config.trainer.policy, config.trainer.mtp, config.trainer.dflash):
        part.optimizer_config.offload_after_step = setup.offloads
    if setup.long_rows:
        config.trainer.logprobs_chunk_size = config.trainer.mtp.loss_chunk_size = 1024
        config.trainer.dflash.loss_chunk_size, config.trainer.dflash.anchors_per_sequence = 1024, 64
    return PolicyTrainer(config, spec, ranks, total_optimizer_steps=10)


def with_experts(batch: TrainBatch, seed: int) -> TrainBatch:
    """``batch`` with random experts for all tokens but the last of each row."""
    rng = np.random.default_rng(seed)
    shape = (batch.lengths.sum(), NUM_LAYERS, NUM_EXPERTS)
    chosen = rng.random(shape).argsort(axis=-1)[..., :EXPERTS_PER_TOKEN].astype(np.uint8)
    rows = np.split(chosen, batch.lengths.cumsum()[:-1])
    return replace(batch, experts=tuple(row[:-1] for row in rows))


def write_trained_model(folder: Path, trained: str) -> Path:
    """A tiny checkpoint for a draft of this name, or a mixture."""
    if trained == MIXTURE:
        return write_model(folder / "model", "dflash", num_layers=NUM_LAYERS, has_experts=True)
    return write_model(folder / "model", trained, num_layers=NUM_LAYERS)


def make_long_batch(seed: int, length: int) -> TrainBatch:
    """Two rows, one of ``length`` tokens."""
    lengths, prompt_lengths = np.array([length, length // 3]), np.array([10, 10])
    return batch_of_lengths(np.random.default_rng(seed), prompt_lengths, lengths - prompt_lengths)


def _copies(module: torch.nn.Module, attribute: str) -> dict[str, Tensor]:
    return {name: getattr(parameter, attribute).cpu().clone() for name, parameter in module.named_parameters()}


def bf16_model(folder: Path, draft: str) -> Path:
    """A tiny checkpoint of numbers that bf16 holds exactly, so that fp32 and bf16 begin with the same weights."""
    path = write_trained_model(folder, draft)
    for file in folder.glob("*/model.safetensors"):
        save_file({name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}, file)
    return path


def steps_against_fp32(device: torch.device, folder: Path, trained: str, long_rows: tuple[int, int] = (0, 0)) -> Figure:
    """bf16 on the device against fp32 on a CPU. The figure is the largest share of a limit that is used up.

    Args:
        long_rows: length of a row on CUDA and on a CPU.
    """
    path = bf16_model(folder, trained)
    length = long_rows[0 if device.type == "cuda" else 1]
    setup = Setup(device.type, draft=trained, long_rows=length, num_steps=1 if length else NUM_STEPS)
    wanted = apart(train, replace(setup, device="cpu", dtype="fp32"), path)
    got = apart(train, setup, path)
    shares = loss_shares(got, wanted) | _gradient_shares(got, wanted)
    worst = max(shares, key=lambda name: shares[name])
    return Figure(shares[worst], 1.0, "of the limit", details={"worst": worst, "row length": length or "up to 21"})


def loss_shares(got: Record, wanted: Record) -> dict[str, float]:
    """Relative differences of losses and norms, as shares of their limits.

    Both sides have the same weights in the first step, and weights of their own afterwards.
    """
    shares = {}
    for step, (mine, theirs) in enumerate(zip(got.metrics, wanted.metrics, strict=True)):
        assert all(map(math.isfinite, mine.values())), mine
        limits = {"draft/loss": LATER_LOSS_LIMIT}
        if step == 0:
            limits = dict.fromkeys(LOSSES, LOSS_LIMIT) | {f"{c}/grad_norm": NORM_LIMIT for c in ("policy", "draft")}
        for name, limit in limits.items():
            shares[f"{name}, step {step}"] = abs(mine[name] / theirs[name] - 1) / limit
    return shares


def _gradient_shares(got: Record, wanted: Record) -> dict[str, float]:
    return {
        f"gradient of {component}.{name}": relative_error(got.gradients[0][component][name], gradient) / GRADIENT_LIMIT
        for component, gradients in wanted.gradients[0].items()
        for name, gradient in gradients.items()
    }


def num_different(got: Record, wanted: Record) -> int:
    """Tensors and metrics of ``wanted`` that are not the same in ``got``, to the last bit."""
    different = 0
    for mine, theirs in zip(got.metrics, wanted.metrics, strict=True):
        different += sum(mine[name] != value for name, value in theirs.items())
    pairs = [*zip(got.gradients, wanted.gradients, strict=True), (got.weights, wanted.weights)]
    for mine_by_component, theirs_by_component in pairs:
        for component, theirs_by_name in theirs_by_component.items():
            mine_by_name = mine_by_component[component]
            assert mine_by_name.keys() == theirs_by_name.keys()
            different += sum(not torch.equal(mine_by_name[name], tensor) for name, tensor in theirs_by_name.items())
    return different


def equal_with(device: torch.device, folder: Path, trained: str, **changes: Any) -> Figure:
    """Three steps are the same with ``changes`` of the setup, down to the last bit."""
    path = write_trained_model(folder, trained)
    setup = Setup(device.type, draft=trained)
    got = apart(train, setup, path)
    assert_trains(got)
    wanted = apart(train, replace(setup, **changes), path)
    return Figure(num_different(got, wanted), 0.0, "tensors", details={"gradient norms": _norms(got)})


def _nearly_equal(device: torch.device, folder: Path, trained: str) -> Figure:
    """Steps with Megatron's distributed optimizer, which adds up the gradient norm in another order.

    Three steps in fp32, one in bf16: the first weight that is rounded to the other side changes all later steps.
    """
    path = write_model(folder / "model", trained)
    setups = [
        Setup(device.type, dtype=dtype, draft=trained, num_steps=num_steps)
        for dtype, num_steps in (("fp32", NUM_STEPS), ("bf16", 1))
    ]
    # All forks precede the comparisons, whose threads a fork would not have.
    records = [(apart(train, replace(setup, distributed=True), path), apart(train, setup, path)) for setup in setups]
    errors = {}
    for setup, (got, wanted) in zip(setups, records, strict=True):
        assert_trains(got)
        errors |= {f"{setup.dtype} {name}": error for name, error in _differences(got, wanted).items()}
    worst = max(errors, key=lambda name: errors[name])
    return Figure(errors[worst], DISTRIBUTED_LIMIT, "relative", details={"worst": worst})


def _differences(got: Record, wanted: Record) -> dict[str, float]:
    """Largest relative difference of metrics, gradients and fp32 weights; share of the weights that differ in bf16."""
    errors: dict[str, float] = {}

    def note(name: str, error: float) -> None:
        errors[name] = max(error, errors.get(name, 0.0))

    for mine, theirs in zip(got.metrics, wanted.metrics, strict=True):
        for name, value in theirs.items():
            note(name, abs(mine[name] / value - 1) if value else 0.0)
    for mine_by_component, theirs_by_component in zip(got.gradients, wanted.gradients, strict=True):
        for component, tensors in theirs_by_component.items():
            for name, tensor in tensors.items():
                note(f"gradient of {component}.{name}", relative_error(mine_by_component[component][name], tensor))
    for component, tensors in wanted.weights.items():
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32:
                note(f"{component}.{name}", relative_error(got.weights[component][name], tensor))
    note("share of the weights that are rounded otherwise", _rounded_otherwise(got, wanted))
    return errors


def _rounded_otherwise(got: Record, wanted: Record) -> float:
    """Share of the weights that differ in bf16, none by more than a step. In a small vector, one would be much."""
    mine, theirs = (
        torch.cat([tensor.flatten().bfloat16() for tensors in record.weights.values() for tensor in tensors.values()])
        for record in (got, wanted)
    )
    assert ((mine - theirs).abs() <= 2**-7 * theirs.abs()).all(), "a weight differs by more than a step of bf16"
    return float((mine != theirs).double().mean())


def assert_trains(record: Record) -> None:
    """Nothing would differ where nothing is trained or clipped."""
    for metrics in record.metrics:
        assert metrics["policy/grad_norm"] > 0.01, "the policy's gradient is not clipped"
    for name, gradient in record.gradients[-1]["draft"].items():
        assert gradient.abs().max() > 0, f"the draft's gradient of {name} is 0"


def _norms(record: Record) -> list[float]:
    return [metrics["policy/grad_norm"] for metrics in record.metrics]


def of_each_draft(
    name: str, what: str, function: Callable[..., Figure], drafts: Sequence[str] = DRAFTS, **arguments: Any
) -> list[Check]:
    return [
        Check(
            f"{name} {draft}",
            f"{what}, {'mixture of experts' if draft == MIXTURE else f'{draft} draft'}",
            partial(function, trained=draft, **arguments),
        )
        for draft in drafts
    ]


STEPS = of_each_draft("steps", "three bf16 steps against fp32 on a CPU", steps_against_fp32, (*DRAFTS, MIXTURE))
LONG_ROWS = of_each_draft(
    "long rows",
    "one bf16 step with a row of 8,192 tokens against fp32 on a CPU",
    steps_against_fp32,
    long_rows=(8192, 1200),
)
ISOLATION = of_each_draft(
    "isolation",
    "what changes of the policy (gradients, weights, metrics) without the draft",
    equal_with,
    (*DRAFTS, MIXTURE),
    draft=None,
)
RECOMPUTE = [
    *of_each_draft("recompute", "what changes with recomputed layers", equal_with, recompute="full"),
    *of_each_draft(
        "recompute of mlp", "what changes with recomputed MLPs", equal_with, (*DRAFTS, MIXTURE), recompute="selective"
    ),
]
DISTRIBUTED = of_each_draft(
    "distributed optimizer",
    "steps with Megatron's distributed optimizer against without, in fp32 and bf16",
    _nearly_equal,
)
