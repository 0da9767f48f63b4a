"""Recompute changes gradients, losses and captured states by no bit, or, of norms, by rounding."""

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
from skyrl_spec.types import TrainBatch

# recompute_granularity and recompute_modules
KEPT, FULL = (None, []), ("full", [])
BITWISE, SELECTIVE = ("selective", ["mlp", "core_attn"]), ("selective", ["layernorm", "mlp", "core_attn"])


def _build(path: Path, ranks: Parallel, draft: str | None, recompute: tuple[str | None, list[str]]) -> PolicyTrainer:
    torch.manual_seed(0)
    config = make_config(path, tp=ranks.tp_size, draft=draft)
    megatron = config.trainer.policy.megatron_config
    megatron.recompute_granularity, megatron.recompute_modules = recompute
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
        batch = make_batch(seed=step)
        sums = trainer.forward_backward(batch)
        for name, trainable in trained.items():
            record[f"{name} gradients {step}"] = _gradients(trainable)
        record["metrics"].append(values(trainer._reduce(sums) | trainer.optimizer_step()))
        live = _live_activations(_pack_lengths(trainer, batch))
        assert live == [], live
    for name, trainable in trained.items():
        record[f"{name} weights"] = {
            key: parameter.detach().clone() for key, parameter in trainable.module.named_parameters()
        }
    return record


def _pack_lengths(trainer: PolicyTrainer, batch: TrainBatch) -> set[int]:
    """Lengths of the packs of ``batch`` that no rotary table has: theirs are powers of two."""
    lengths = {len(micro.pack.token_ids_T) for micro in trainer._micros(batch, trainer._shards(batch))}
    lengths = {length for length in lengths if length & (length - 1)}
    parameters = {parameter.shape[0] for parameter in trainer.model.parameters()}
    assert lengths
    assert not lengths & parameters, "parameters look like activations"
    return lengths


def _live_activations(lengths: set[int]) -> list[torch.Size]:
    """Shapes of all live tensors ``[T, ...]`` of a pack: captured states, or keys that a draft remembers."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    # What another test has compiled has symbols for lengths.
    return [x.shape for x in tensors if x.dim() >= 2 and isinstance(x.shape[0], int) and x.shape[0] in lengths]


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
    kept = _train(_build(path, ranks, draft, KEPT))
    assert all(gradient.abs().max() > 0 for gradient in kept["draft gradients 0"].values())
    for recompute in (FULL, BITWISE, SELECTIVE):
        recomputed = _train(_build(path, ranks, draft, recompute))
        if recompute is SELECTIVE:
            # A norm that is recomputed adds its gradient to the residual's in another order.
            for name, gradient in kept["policy gradients 0"].items():
                assert (recomputed["policy gradients 0"][name] - gradient).norm() < 2e-6 * gradient.norm(), name
        else:
            _assert_equal(recomputed, kept, f"{recompute} against kept activations")
        # Isolation: the policy's record is the same without a draft.
        _assert_equal(recomputed, _train(_build(path, ranks, None, recompute)), "draft against none")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_recompute_changes_nothing_of_policy_and_draft(tmp_path: Path, draft: str, tp: int) -> None:
    run_distributed(_check, tp, write_model(tmp_path / "model", draft), draft, tp, timeout_s=300.0)


PARTS = ("", "input_layernorm", "mlp", "self_attention.core_attention")
# Calls of a layer's parts by the end of the backward pass.
CALLS = ((KEPT, (1, 1, 1, 1)), (FULL, (2, 2, 2, 2)), (BITWISE, (1, 1, 2, 2)), (SELECTIVE, (1, 2, 2, 2)))


def _captured(trainer: PolicyTrainer) -> tuple[dict[Any, Tensor], tuple[int, ...]]:
    """Captured states of one forward pass, and how often parts of a layer ran by the end of the backward pass."""
    calls = dict.fromkeys(PARTS, 0)

    def count(name: str) -> None:
        calls[name] += 1

    layer = trainer.model.decoder.layers[0]
    handles = [layer.get_submodule(name).register_forward_hook(lambda *_, name=name: count(name)) for name in PARTS]
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
    for handle in handles:
        handle.remove()
    return states, tuple(calls.values())


def _check_capture(_rank: int, path: Path, draft: str, tp: int) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    kept, _ = _captured(_build(path, ranks, draft, KEPT))
    for recompute, expected_calls in CALLS:
        states, calls = _captured(_build(path, ranks, draft, recompute))
        assert calls == expected_calls, recompute
        assert kept.keys() == states.keys()
        for point, state in kept.items():
            assert torch.equal(states[point], state), point
            assert not states[point].requires_grad, point


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
def test_captured_states_are_those_of_the_forward_pass(tmp_path: Path, draft: str, tp: int) -> None:
    run_distributed(_check_capture, tp, write_model(tmp_path / "model", draft), draft, tp)


def test_live_activations_are_seen() -> None:
    """The check above finds a captured state that is kept."""
    kept = torch.zeros(11, 1, 4)
    assert _live_activations({11}) == [kept.shape]
    del kept
    assert _live_activations({11}) == []
