"""Isolation: every bit of the policy is equal with the draft and without.

PolicyTrainers on gloo processes. Each process trains twice, compares its own results, and names the combination that
failed.
"""

from __future__ import annotations

import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.optimizer import MegatronOptimizer
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.optimizer import Trainable
from skyrl_spec.training.trainer import PolicyTrainer

# Tensor-, context-, pipeline- and data-parallel size.
LAYOUTS = ((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (2, 1, 1, 2))
# The same, and the expert-parallel size.
EXPERT_LAYOUTS = ((1, 1, 1, 2, 2), (2, 1, 1, 1, 2))
LARGE_EXPERT_LAYOUTS = ((1, 1, 2, 2, 2), (1, 1, 1, 4, 2), (1, 2, 1, 2, 2))
LARGE_LAYOUTS = ((2, 2, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1))
# Tokens of a micro-batch: several micro-batches, and one.
MICRO_BATCHES = {"accumulated": 40, "at once": 1000}


def _build(path: Path, ranks: Parallel, draft: str | None, max_tokens: int, **options: Any) -> PolicyTrainer:
    torch.manual_seed(0)
    sizes = {"tp": ranks.tp_size, "cp": ranks.cp_size, "pp": ranks.pp_size}
    config = make_config(path, draft=draft, **sizes, **options)
    config.trainer.max_tokens_per_microbatch = max_tokens
    return PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)


def _train(trainer: PolicyTrainer) -> dict[str, Any]:
    """This rank's state of the policy after two steps."""
    assert trainer.policy is not None
    record: dict[str, Any] = {"metrics": [], "gradients": []}
    for step in range(2):
        sums = trainer.forward_backward(make_batch(seed=step))
        record["gradients"].append(_gradients(trainer.policy))
        record["metrics"].append(values(trainer._reduce(sums) | trainer.optimizer_step()))
    record["weights"] = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    record["optimizer"] = _optimizer_tensors(trainer.policy.optimizer)
    record["rng"] = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
    record["python rng"] = random.getstate()
    return record


def _gradients(trainable: Trainable) -> dict[str, torch.Tensor]:
    """Gradients in the whole buffer, before clipping. With a distributed optimizer it has other ranks' parts too."""
    return {name: parameter.main_grad.clone() for name, parameter in trainable.module.named_parameters()}


def _optimizer_tensors(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """Moments and fp32 masters, in the optimizer's order."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    found = []
    for part in chained:
        found += [p.detach().clone() for group in part.optimizer.param_groups for p in group["params"]]
        states = part.optimizer.state.values()
        found += [value.clone() for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return found


def _assert_equal(mine: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(mine, theirs), where
    elif isinstance(theirs, dict):
        for key in theirs:
            _assert_equal(mine[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs), where
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            _assert_equal(one, other, f"{where} {index}")
    else:
        assert mine == theirs, where


def _check(_rank: int, path: Path, draft: str, tp: int, cp: int, pp: int, ep: int = 1) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"), cp, pp, ep)
    for dtype, distributed, (name, micro_rows) in product(("fp32", "bf16"), (False, True), MICRO_BATCHES.items()):
        where = f"{dtype}, distributed optimizer {distributed}, {name}"
        # One combination in two has both.
        options = {"dtype": dtype, "distributed": distributed, "sequence_parallel": distributed and tp > 1, "ep": ep}
        if ep > 1:
            options["sequence_parallel"] = None
        without = _train(_build(path, ranks, None, micro_rows, **options))
        trainer = _build(path, ranks, draft, micro_rows, **options)
        with_draft = _train(trainer)
        _assert_equal(with_draft, without, where)
        num_replicas = ranks.dp_size * ranks.cp_size
        assert len(without["optimizer"]) > 2 * len(without["weights"]) / num_replicas, where
        assert without["metrics"][-1]["policy/grad_norm"] > 0.01, f"{where}: clipping was to be active"
        _check_draft_alone(trainer, where)


def _check_draft_alone(trainer: PolicyTrainer, where: str) -> None:
    """The draft's backward pass gives every parameter of the draft a gradient, and no parameter of the policy."""
    assert trainer.policy is not None
    trainer.policy.zero_grad()
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train_draft(make_batch(seed=7))
    for name, parameter in trainer.model.named_parameters():
        assert parameter.main_grad.abs().max() == 0, (where, name)
        assert parameter.grad is None, (where, name)
        assert torch.equal(parameter, before[name]), (where, name)
    if trainer.draft is None:
        assert not trainer.parallel.is_last_stage
        return
    for name, gradient in _gradients(trainer.draft.trainable).items():
        # Of several ranks, one may have no response to draft in.
        largest = gradient.abs().max()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=trainer.parallel.dp_cp_group)
        assert largest > 0, (where, name)


# Four processes are slow on two cores, so with both parallelisms embeddings are untied only.
CASES = [(layout, tied) for layout in LAYOUTS for tied in (False, True) if not tied or math.prod(layout) < 4]


@pytest.mark.parametrize("draft", ["mtp", "dflash"])
@pytest.mark.parametrize(("layout", "tied"), CASES)
def test_the_draft_does_not_change_a_bit_of_the_policy(
    tmp_path: Path, layout: tuple[int, int, int, int], draft: str, tied: bool
) -> None:
    path = write_model(tmp_path / "model", draft, tied=tied)
    run_distributed(_check, math.prod(layout), path, draft, *layout[:3], timeout_s=300.0)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["mtp", "dflash"])
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_nor_in_layouts_of_several_kinds(tmp_path: Path, layout: tuple[int, int, int, int], draft: str) -> None:
    path = write_model(tmp_path / "model", draft)
    run_distributed(_check, math.prod(layout), path, draft, *layout[:3], timeout_s=600.0)


def _check_experts(tmp_path: Path, layout: tuple[int, int, int, int, int]) -> None:
    path = write_model(tmp_path / "model", "dflash", has_experts=True)
    tp, cp, pp, _, ep = layout
    run_distributed(_check, math.prod(layout[:4]), path, "dflash", tp, cp, pp, ep, timeout_s=600.0)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_nor_of_a_mixture_of_experts(tmp_path: Path, layout: tuple[int, int, int, int, int]) -> None:
    _check_experts(tmp_path, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_EXPERT_LAYOUTS)
def test_nor_of_experts_on_four_ranks(tmp_path: Path, layout: tuple[int, int, int, int, int]) -> None:
    _check_experts(tmp_path, layout)
