"""Recompute changes no bit: gradients, losses and captured states equal those of a run that keeps activations."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, make_pack, random_documents, write_model
from torch import Tensor

from skyrl_spec.metrics.values import values
from skyrl_spec.models import megatron_patches, parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.training.trainer import PolicyTrainer

# Rows of the micro-batches that eight rows make, three at a time.
MICRO_BATCH_ROWS = (3, 2)


def _build(path: Path, ranks: Parallel, draft: str | None, recompute: bool) -> PolicyTrainer:
    torch.manual_seed(0)
    config = make_config(path, tp=ranks.tp_size, draft=draft)
    config.trainer.policy.megatron_config.recompute_activations = recompute
    return PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)


def _gradients(trainable: Trainable) -> dict[str, Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in trainable.module.named_parameters()}


def _train(trainer: PolicyTrainer) -> dict[str, Any]:
    """Metrics, gradients before clipping and final weights of two steps, of policy and draft."""
    trained: dict[str, Trainable] = {"policy": trainer.policy}
    if trainer.draft is not None:
        trained["draft"] = trainer.draft.trainable
    record: dict[str, Any] = {"metrics": []}
    for step in range(2):
        sums = trainer.forward_backward(make_batch(seed=step))
        for name, trainable in trained.items():
            record[f"{name} gradients {step}"] = _gradients(trainable)
        record["metrics"].append(values(trainer._reduce(sums) | trainer.optimizer_step()))
        _assert_no_activations_live()
    for name, trainable in trained.items():
        record[f"{name} weights"] = {
            key: parameter.detach().clone() for key, parameter in trainable.module.named_parameters()
        }
    return record


def _live_activations() -> list[torch.Size]:
    """Shapes of all live tensors ``[S, B, ...]``: captured states, or keys and values that a draft remembers."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    return [x.shape for x in tensors if x.dim() >= 3 and x.shape[1] in MICRO_BATCH_ROWS]


def _assert_no_activations_live() -> None:
    assert _live_activations() == []


def _assert_equal(actual: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Everything in ``expected`` is in ``actual``, bit for bit."""
    for key, values_of_key in expected.items():
        if key == "metrics":
            for one, other in zip(actual[key], values_of_key, strict=True):
                assert {name: one[name] for name in other} == other, where
            continue
        assert actual[key].keys() == values_of_key.keys(), (where, key)
        for name, tensor in values_of_key.items():
            assert torch.equal(actual[key][name], tensor), (where, key, name)


def _check(_rank: int, path: Path, draft: str, tp: int) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    kept = _train(_build(path, ranks, draft, recompute=False))
    recomputed = _train(_build(path, ranks, draft, recompute=True))
    _assert_equal(recomputed, kept, "recompute against kept activations")
    assert all(gradient.abs().max() > 0 for gradient in kept["draft gradients 0"].values())
    # Isolation: the policy's record is the same without a draft.
    _assert_equal(recomputed, _train(_build(path, ranks, None, recompute=True)), "draft against none")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_recompute_changes_no_bit_of_policy_and_draft(tmp_path: Path, draft: str, tp: int) -> None:
    run_distributed(_check, tp, write_model(tmp_path / "model", draft), draft, tp, timeout_s=300.0)


def _captured(trainer: PolicyTrainer) -> tuple[dict[Any, Tensor], int]:
    """Captured states of one forward pass, and how often a layer ran by the end of the backward pass."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = trainer.model.decoder.layers[0].register_forward_hook(count)
    with (
        capture(trainer.model, trainer.draft.draft.capture_points) as captured,
        megatron_patches.megatron_device(trainer.parallel.device),
    ):
        with captured.listening():
            hidden_TD = trainer.model(make_pack(*random_documents(5, 7)))
        states = captured.take()
        hidden_TD.square().sum().backward()
        # Recompute runs the hooks again. They must not keep what they see then.
        assert captured.take() == {}
    handle.remove()
    return states, calls


def _check_capture(_rank: int, path: Path, draft: str, tp: int) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    kept, kept_calls = _captured(_build(path, ranks, draft, recompute=False))
    recomputed, recomputed_calls = _captured(_build(path, ranks, draft, recompute=True))
    assert (kept_calls, recomputed_calls) == (1, 2)
    assert kept.keys() == recomputed.keys()
    for point, state in kept.items():
        assert torch.equal(recomputed[point], state), point
        assert not recomputed[point].requires_grad, point


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_captured_states_are_those_of_the_forward_pass(tmp_path: Path, draft: str, tp: int) -> None:
    run_distributed(_check_capture, tp, write_model(tmp_path / "model", draft), draft, tp)


def test_live_activations_are_seen() -> None:
    """The check above finds a captured state that is kept."""
    kept = torch.zeros(11, 3, 4)
    shape = kept.shape
    assert shape in _live_activations()
    del kept
    assert shape not in _live_activations()
