"""Offload to host memory: training is equal to the last bit, and what is away is freed, saved and back in time."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.checkpoint.optimizer_state import optimizers
from skyrl_spec.checkpoint.pieces import main_replicas, sharded
from skyrl_spec.models import parallel
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.host_copies import HostCopies
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import SERVED

CPU = torch.device("cpu")


def _build(path: Path, ranks: Parallel, draft: str, *, offload: bool, **options: Any) -> PolicyTrainer:
    torch.manual_seed(0)
    config = make_config(path, tp=ranks.tp_size, pp=ranks.pp_size, draft=draft, **options)
    trainer = config.trainer
    trainer.algorithm.use_kl_loss, trainer.ref.cpu_offload = True, offload
    trainer.policy.megatron_config.cpu_offload = offload
    for optimizer in (trainer.policy, trainer.mtp, trainer.dflash):
        optimizer.optimizer_config.offload_after_step = offload
    return PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)


def _exported(trainer: PolicyTrainer) -> list[torch.Tensor]:
    return [tensor.clone() for component in ("policy", "draft") for _, tensor in trainer.export(component)]


def _saved(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold of this rank."""
    pieces = main_replicas(sharded(trainer.saved_components()), copies=True)
    return {name: piece.data for name, piece in pieces.items()}


def _bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _trained_tensors(trainer: PolicyTrainer) -> list[torch.Tensor]:
    """Weights, the reference's too, gradients, moments and fp32 masters: all that is to go."""
    assert trainer.policy is not None
    assert trainer.reference is not None
    draft = [] if trainer.draft is None else [trainer.draft.trainable]
    assert bool(draft) == trainer.parallel.is_last_stage
    parts = (trainer.policy, *draft)
    weights = [*(one for part in parts for one in part.module.parameters()), *trainer.reference.parameters()]
    buffers = [buffer for part in parts for buffer in (*part.ddp.buffers, *part.ddp.expert_parallel_buffers)]
    gradients = [buffer.grad_data for buffer in buffers]
    return [*weights, *gradients, *(tensor for part in parts for tensor in _optimizer_tensors(part))]


def _optimizer_tensors(trainable: Trainable) -> list[torch.Tensor]:
    """Moments, and what the inner optimizer updates."""
    inner = [optimizer.optimizer for optimizer in optimizers(trainable)]
    mains = [parameter for one in inner for group in one.param_groups for parameter in group["params"]]
    states = [value for one in inner for state in one.state.values() for value in state.values()]
    # Counts of steps stay.
    return [*mains, *(value for value in states if value.numel() > 1)]


def _step(trainer: PolicyTrainer, step: int) -> list[Any]:
    """A training step as the driver asks for it: two updates, one of which is undone for the draft."""
    # Training itself finds the weights away in one step.
    logprobs = {} if step == 2 else trainer.forward_logprobs(make_batch(step))
    if (copies := trainer.draft_copies if step < 2 else None) is not None:
        copies.keep(SERVED)
    reports = [trainer.train_mini_batch(make_batch(seed)) for seed in (step, 10 + step)]
    if step == 1 and copies is not None:
        copies.restore(SERVED)
    trainer.offload.training_state()
    exported = _exported(trainer)
    trainer.offload.weights()
    # Another sync finds them away.
    again = _exported(trainer)
    trainer.offload.weights()
    return [logprobs, [report.metrics for report in reports], exported, again]


def _check(_rank: int, path: Path, draft: str, tp: int, pp: int, ep: int = 1) -> None:
    ranks = parallel.lay_out(tp, CPU, pipeline_parallel_size=pp, expert_parallel_size=ep)
    for dtype, distributed in product(("fp32", "bf16"), (False, True)):
        options = {"dtype": dtype, "distributed": distributed, "ep": ep}
        plain = _build(path, ranks, draft, offload=False, **options)
        trainer = _build(path, ranks, draft, offload=True, **options)
        # The reference is needed first in a step.
        assert trainer.reference is not None
        assert _bytes_of(list(trainer.reference.parameters())) == 0
        for step in range(3):
            for one, other in zip(_flat(_step(trainer, step)), _flat(_step(plain, step)), strict=True):
                assert torch.equal(one, other), (dtype, distributed, step)
            assert _bytes_of(_trained_tensors(trainer)) == 0, (dtype, distributed, step)
            assert _bytes_of(_trained_tensors(plain)) > 0
            # A checkpoint is read from host memory, and brings nothing back.
            saved, expected = _saved(trainer), _saved(plain)
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[name], expected[name]) for name in saved), (dtype, distributed, step)
            assert _bytes_of(_trained_tensors(trainer)) == 0


def _flat(values: Any) -> list[torch.Tensor]:
    if isinstance(values, dict):
        return [tensor for key in sorted(values) for tensor in _flat(values[key])]
    if isinstance(values, list):
        return [tensor for value in values for tensor in _flat(value)]
    if hasattr(values, "total"):
        return [torch.tensor([values.total, values.count], dtype=torch.float64)]
    return [torch.as_tensor(values)]


@pytest.mark.parametrize("draft", ["mtp", "dflash"])
@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_training_is_the_same_to_the_last_bit(tmp_path: Path, draft: str, tp: int, pp: int, dp: int) -> None:
    path = write_model(tmp_path / "model", draft, tied=tp == pp == 1)
    run_distributed(_check, tp * pp * dp, path, draft, tp, pp)


def test_training_of_experts_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "dflash", has_experts=True)
    run_distributed(_check, 2, path, "dflash", 1, 1, 2)


def test_views_and_shared_storages_come_back_as_they_were() -> None:
    whole = torch.arange(12.0)
    view, half = whole.view(3, 4)[:, 1:], whole[6:]
    expected = view.clone(), half.clone()
    copies = HostCopies(lambda: (view, half), CPU)
    copies.offload()
    assert whole.untyped_storage().nbytes() == 0
    assert torch.equal(copies.current(view), expected[0])
    assert copies.current(view).data_ptr() != view.data_ptr()
    # Twice is as good as once.
    copies.offload()
    copies.reload()
    copies.require()
    assert torch.equal(view, expected[0])
    assert torch.equal(half, expected[1])
    assert copies.current(view) is view


def test_changes_are_copied_again_unless_values_are_constant() -> None:
    for are_constant in (False, True):
        tensor = torch.zeros(4)
        copies = HostCopies(lambda tensor=tensor: (tensor,), CPU, are_constant=are_constant)
        copies.offload()
        copies.require()
        tensor += 1
        copies.offload()
        copies.require()
        assert tensor.tolist() == [0.0 if are_constant else 1.0] * 4
