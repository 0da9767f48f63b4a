"""What a checkpoint brings back: bitwise the same training, under the same parallel layout; the same numbers, under another.

Real PolicyTrainers on real gloo processes. A job holds several checks, since starting its processes takes longest.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
import torch.distributed
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_checkpoint

from skyrl_spec.checkpoint import dist, folders
from skyrl_spec.config import ConfigError, RunError
from skyrl_spec.megatron import parallel
from skyrl_spec.megatron.conversion import export_weights
from skyrl_spec.megatron.trainer import PolicyTrainer
from skyrl_spec.metrics.values import values
from skyrl_spec.model_spec import load_spec

EXTRA = {"step": 2, "lr": 0.1 + 0.2, "metrics": {"policy/grad_norm": 1e-300}, "name": "läuft", "none": None}

# Pads to 192 rows under TP 1, to 256 under TP 2.
VOCAB_SIZE = 150

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp1-bf16": {"dtype": "bf16"},
    "tp2": {"tp": 2},
    "tp2-bf16": {"tp": 2, "dtype": "bf16"},
    "dp2": {},
    "dp2-bf16": {"dtype": "bf16"},
    "dp2-distributed": {"distributed": True},
    "dp2-distributed-bf16": {"distributed": True, "dtype": "bf16"},
    "tp1-distributed": {"distributed": True},
    "tp1-distributed-bf16": {"distributed": True, "dtype": "bf16"},
}


@pytest.fixture(scope="module", params=["untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_checkpoints, "VOCAB_SIZE", VOCAB_SIZE)
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def _build(model: Path, layout: str, **options: Any) -> PolicyTrainer:
    """A trainer in the groups of ``layout``, which replace those that were there."""
    options = LAYOUTS[layout] | options
    tp = options.get("tp", 1)
    if parallel.parallel_state.is_initialized():
        parallel.parallel_state.destroy_model_parallel()
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    config = make_config(model, **options)
    config.trainer.policy.optimizer_config.num_warmup_steps = 2
    config.trainer.policy.optimizer_config.scheduler = "cosine"
    config.trainer.policy.optimizer_config.weight_decay = 0.1
    return PolicyTrainer(config, load_spec(str(model)), ranks, total_optimizer_steps=10)


def _train(trainer: PolicyTrainer, seeds: range) -> list[dict[str, float]]:
    return [
        values(trainer._reduce(trainer.forward_backward(make_batch(seed))) | trainer.optimizer_step()) for seed in seeds
    ]


def _state(trainer: PolicyTrainer) -> dict[str, Any]:
    """Everything that training changed, as this rank has it."""
    state: dict[str, Any] = {}
    for name, part in dist.parts(trainer).items():
        for key, parameter in part.trainable.module.named_parameters():
            for kind, flat, start, _ in dist._tensors(part.trainable, parameter):
                state[f"{name}.{key}.{kind}.{start}"] = flat.clone()
        inner = [optimizer.optimizer for optimizer in dist._optimizers(part.trainable)]
        state[f"{name}.steps"] = [int(entry["step"]) for optimizer in inner for entry in optimizer.state.values()]
        groups = [group for optimizer in inner for group in optimizer.param_groups]
        state[f"{name}.groups"] = [{key: group[key] for key in group if key != "params"} for group in groups]
        state[f"{name}.scheduler"] = part.trainable.scheduler.state_dict()
    return state


def _assert_same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[key].dtype, key
            assert torch.equal(value, theirs[key]), key
        else:
            assert value == theirs[key], key


def _full_state(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    """Parameters, moments and masters as full tensors by HF name, put together without the code under test."""
    full: dict[str, torch.Tensor] = {}
    for name, part in dist.parts(trainer).items():
        by_kind: dict[str, dict[str, torch.Tensor]] = {}
        for key, parameter in part.trainable.module.named_parameters():
            tensors = {kind: (flat, start) for kind, flat, start, _ in dist._tensors(part.trainable, parameter)}
            kinds = ["param", "exp_avg", "exp_avg_sq", *(["master"] if parameter.dtype == torch.bfloat16 else [])]
            for kind in kinds:
                whole = torch.zeros(parameter.numel())
                if kind in tensors:
                    flat, start = tensors[kind]
                    whole[start : start + flat.numel()] = flat.float()
                if kind != "param" and trainer.config.trainer.policy.megatron_config.use_distributed_optimizer:
                    torch.distributed.all_reduce(whole, group=trainer.parallel.dp_group)
                by_kind.setdefault(kind, {})[key] = whole.view(parameter.shape)
        for kind, tensors in by_kind.items():
            stand_in = torch.nn.Module()
            stand_in.named_parameters = lambda tensors=tensors: tensors.items()  # type: ignore[method-assign]
            for hf_name, tensor in export_weights(stand_in, part.rules, trainer.parallel):
                full[f"{name}.{kind}.{hf_name}"] = tensor.clone()
    return full


def _per_rank() -> dict[str, torch.Tensor]:
    return {"generator": torch.Generator().manual_seed(torch.distributed.get_rank()).get_state()}


import time, sys

T0 = time.time()


def _tick(x):
    print("TICK", x, round(time.time() - T0, 1), file=sys.stderr, flush=True)


def _resume_job(rank: int, model: Path, root: Path, layouts: list[str]) -> None:
    """2 steps, save, 2 more; against: a fresh trainer, load, the same 2."""
    for layout in layouts:
        _tick(layout)
        directory = root / layout / "step_2"
        torch.manual_seed(rank)
        trainer = _build(model, layout)
        for part in dist.parts(trainer).values():
            dist._initialize_optimizer(part.trainable)
        fresh = _full_state(trainer)
        _train(trainer, range(2))
        dist.save(directory, dist.parts(trainer), EXTRA, _per_rank())
        saved, full = _state(trainer), _full_state(trainer)
        if rank == 0:
            torch.save(full, root / layout / "full.pt")
        rng = torch.get_rng_state()
        metrics = _train(trainer, range(2, 4))
        trained = _state(trainer)

        torch.manual_seed(99)
        resumed = _build(model, layout)
        loaded = dist.load(directory, dist.parts(resumed))
        assert loaded.extra == EXTRA
        assert torch.equal(loaded.per_rank["generator"], _per_rank()["generator"])
        assert torch.equal(torch.get_rng_state(), rng)
        _assert_same(_state(resumed), saved)
        assert _train(resumed, range(2, 4)) == metrics
        _assert_same(_state(resumed), trained)
        # And the comparison could have failed: training changed every tensor, before and after the save.
        for key, tensor in _full_state(trainer).items():
            if not key.endswith("norm.weight") or ".param." not in key:
                assert not torch.equal(fresh[key], full[key]), key
                assert not torch.equal(full[key], tensor), key
        assert metrics[0]["draft/grad_norm"] > 0 < metrics[0]["policy/grad_norm"]
        assert folders.contents(directory) == {"policy", "draft"}


def _reshard_job(rank: int, model: Path, root: Path, pairs: list[tuple[str, str]]) -> None:
    """Load what another layout saved: the same full tensors, and training goes on as it did there."""
    for source, target in pairs:
        _tick((source, target))
        directory = root / source / "step_2"
        torch.manual_seed(99)
        trainer = _build(model, target)
        before = torch.get_rng_state()
        loaded = dist.load(directory, dist.parts(trainer))
        assert loaded.extra == EXTRA
        _assert_same(_full_state(trainer), torch.load(root / source / "full.pt", weights_only=True))
        assert all(part.trainable.scheduler.num_steps == 2 for part in dist.parts(trainer).values())
        # States come from the same data-parallel index, equal within a tensor-parallel group; else they stay.
        saved_world = 1 if source.startswith("tp1") else 2
        saved_dp = 2 if source.startswith("dp2") else 1
        if trainer.parallel.dp_rank < saved_dp:
            from_rank = trainer.parallel.dp_rank if LAYOUTS[source].get("tp", 1) == 1 else 0
            if source.split("-")[0] == target.split("-")[0]:
                from_rank = rank
            assert from_rank < saved_world
            expected = torch.Generator().manual_seed(from_rank).get_state()
            assert torch.equal(loaded.per_rank["generator"], expected), (source, target)
            assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(from_rank).get_state())
        else:
            assert loaded.per_rank == {}
            assert torch.equal(torch.get_rng_state(), before)
        metrics = _train(trainer, range(2, 3))[0]
        reference = root / source / "metrics.pt"
        if rank == 0 and reference.exists():
            assert metrics == pytest.approx(torch.load(reference), rel=1e-2)
        # What comes out of a resharded load can be saved, and loads as the same again.
        again = root / f"{source}-{target}" / "step_3"
        dist.save(again, dist.parts(trainer), EXTRA)
        state = _state(trainer)
        other = _build(model, target)
        dist.load(again, dist.parts(other))
        _assert_same(_state(other), state)


@pytest.fixture(scope="module")
def root(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_resumed_training_is_bitwise_the_same_and_checkpoints_load_under_other_layouts(model: Path, root: Path) -> None:
    singles = [layout for layout in LAYOUTS if layout.startswith("tp1")]
    pairs = [layout for layout in LAYOUTS if not layout.startswith("tp1")]
    run_distributed(_resume_job, 1, model, root, singles)
    run_distributed(_resume_job, 2, model, root, pairs)
    to_single = [
        ("tp2", "tp1"),
        ("tp2-bf16", "tp1-bf16"),
        ("dp2", "tp1"),
        ("dp2-distributed", "tp1-distributed"),
        ("dp2-distributed-bf16", "tp1-bf16"),
    ]
    to_two = [
        ("tp1", "tp2"),
        ("tp1-distributed-bf16", "tp2-bf16"),
        ("tp1-distributed", "dp2-distributed"),
        ("dp2-distributed-bf16", "tp2-bf16"),
        ("dp2-distributed", "dp2"),
        ("tp2-bf16", "dp2-distributed-bf16"),
    ]
    run_distributed(_reshard_job, 1, model, root, to_single)
    run_distributed(_reshard_job, 2, model, root, to_two)
