"""What a mini-batch trains does not depend on the parallel layout.

Real PolicyTrainers on real gloo processes; every rank writes what it has, the test compares each with a single rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gradients import hf_gradients
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model
from torch import Tensor

from skyrl_spec.data.packing import gather_shards
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import Component, Generation, Proposals, Versions

COMPONENTS: tuple[Component, ...] = ("policy", "draft")
NUM_STEPS = 3
LR = 1e-3
# fp32, sums in another order; of gradients: norm of the difference over norm of the gradient.
TOLERANCE = 1e-5
# Of a weight's largest difference, where updates move it by about the learning rate.
WEIGHT_TOLERANCE = 1e-3 * LR


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    # Experts are laid over the same ranks.
    ep: int = 1
    expert_tp: int = 1
    distributed: bool = False
    sequence_parallel: bool | None = False
    # Layers of the last stage.
    last: int | None = None


ONE_RANK = Layout()
# Of an engine: two responses, the second with two blocks.
PROPOSALS = [
    Proposals([5, 6, 7], Generation([8, 9, 10, 11], [0.0] * 4, "length", Versions()), [3], [[9, 10, 11]], [[0.0] * 3]),
    Proposals(
        [1, 2],
        Generation([3, 4, 5, 6, 7], [0.0] * 5, "length", Versions()),
        [2, 4],
        [[4, 4, 9], [6, 7, 1]],
        [[0.0] * 3] * 2,
    ),
]
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2, sequence parallel": Layout(tp=2, sequence_parallel=True),
    "dp2": Layout(dp=2),
    "dp2, distributed optimizer": Layout(dp=2, distributed=True),
    "cp2": Layout(cp=2),
    "cp2, distributed optimizer": Layout(cp=2, distributed=True),
    "pp2": Layout(pp=2),
    "pp2, distributed optimizer": Layout(pp=2, distributed=True),
}
LARGE_LAYOUTS = {
    "cp2, tp2": Layout(cp=2, tp=2),
    "cp2, tp2, sequence parallel": Layout(cp=2, tp=2, sequence_parallel=True),
    "cp2, dp2, distributed optimizer": Layout(cp=2, dp=2, distributed=True),
    "cp4": Layout(cp=4),
    "pp2, tp2": Layout(pp=2, tp=2),
    "pp2, tp2, sequence parallel": Layout(pp=2, tp=2, sequence_parallel=True),
    "pp2, cp2": Layout(pp=2, cp=2),
    "pp2, dp2, distributed optimizer": Layout(pp=2, dp=2, distributed=True),
}


def _config(path: Path, draft: str, layout: Layout) -> Config:
    config = make_config(
        path,
        draft=draft,
        tp=layout.tp,
        cp=layout.cp,
        pp=layout.pp,
        ep=layout.ep,
        expert_tp=layout.expert_tp,
        distributed=layout.distributed,
        sequence_parallel=layout.sequence_parallel,
    )
    trainer = config.trainer
    trainer.policy.megatron_config.num_layers_in_last_pipeline_stage = layout.last
    for optimizer in (trainer.policy.optimizer_config, trainer.mtp.optimizer_config, trainer.dflash.optimizer_config):
        optimizer.lr = LR
        # About the size of a gradient's entry. With an epsilon far below it an update is the learning rate times the
        # gradient's sign, and rounding decides the sign of a gradient near 0.
        optimizer.adam_eps = 1e-5
    return config


def _weights(trainer: PolicyTrainer) -> dict[Component, dict[str, Tensor]]:
    return {component: {name: tensor.clone() for name, tensor in trainer.export(component)} for component in COMPONENTS}


def _train(rank: int, path: Path, draft: str, layout: Layout, out: Path) -> None:
    torch.manual_seed(0)
    sizes = (layout.cp, layout.pp, layout.ep, layout.expert_tp)
    config, ranks = _config(path, draft, layout), parallel.lay_out(layout.tp, torch.device("cpu"), *sizes)
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    record: dict[str, Any] = {"start": _weights(trainer), "metrics": [], "gradients": []}
    # Losses and scores are there.
    record["is_last_stage"] = ranks.is_last_stage
    for step in range(NUM_STEPS):
        sums = trainer.forward_backward(make_batch(seed=step))
        record["gradients"].append({component: hf_gradients(trainer, component) for component in COMPONENTS})
        record["metrics"].append(values(trainer._reduce(sums) | trainer.optimizer_step()))
    record["weights"] = _weights(trainer)
    scores = trainer.score_proposals(PROPOSALS)
    record["scores"] = torch.from_numpy(np.concatenate([scores.policy_logprobs, scores.draft_logprobs.flatten()]))
    batch = make_batch(seed=9)
    mine = trainer.forward_logprobs(batch)["policy_logprobs"]
    shards = [None] * ranks.dp_size
    dist.all_gather_object(shards, {"logprobs": mine}, group=ranks.dp_group)
    record["logprobs"] = torch.from_numpy(gather_shards(batch, shards)["logprobs"])
    torch.save(record, out / f"{rank}.pt")


def train(path: Path, draft: str, out: Path, layout: Layout = ONE_RANK) -> list[Any]:
    """What each rank has of a few steps."""
    out.mkdir()
    num_ranks = layout.tp * layout.cp * layout.pp * layout.dp
    run_distributed(_train, num_ranks, path, draft, layout, out)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _by_parameter(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts of a layer together, as they are one parameter."""
    found: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        found.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(gradient)
    return {name: torch.stack(parts) for name, parts in found.items()}


def _assert_gradients_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    for name, gradient in mine.items():
        assert theirs[name].norm() > 0, (where, name)
        assert (gradient - theirs[name]).norm() < TOLERANCE * theirs[name].norm(), (where, name)


def _assert_weights_equal(mine: dict[str, Tensor], single: dict[str, Any], component: Component, where: str) -> None:
    start, end = single["start"][component], single["weights"][component]
    assert mine.keys() == end.keys()
    for name, tensor in end.items():
        assert (tensor - start[name]).abs().max() > 0.1 * LR, f"{name} was to move"
        assert (mine[name] - tensor).abs().max() < WEIGHT_TOLERANCE, (where, name)


# Of a mixture of experts, whose draft is dense.
EXPERT_LAYOUTS = {
    "ep2": Layout(dp=2, ep=2),
    "ep2, distributed optimizer": Layout(dp=2, ep=2, distributed=True),
    "ep2, tp2": Layout(tp=2, ep=2, sequence_parallel=None),
    "expert tp2": Layout(tp=2, expert_tp=2, sequence_parallel=None),
    "dp2": Layout(dp=2),
}
LARGE_EXPERT_LAYOUTS = {
    "ep2, dp2": Layout(dp=4, ep=2),
    "ep2, dp2, distributed optimizer": Layout(dp=4, ep=2, distributed=True),
    "ep4": Layout(dp=4, ep=4),
    "ep2, pp2": Layout(pp=2, dp=2, ep=2),
    "ep2, cp2": Layout(cp=2, dp=2, ep=2),
    "ep2, expert tp2": Layout(tp=2, dp=2, ep=2, expert_tp=2, sequence_parallel=None),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module", params=["mtp", "dflash"])
def draft(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(draft: str, tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint") / "model", draft, tied=tied)


@pytest.fixture(scope="module")
def single(checkpoint: Path, draft: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a single rank has."""
    return train(checkpoint, draft, tmp_path_factory.mktemp("single") / "ranks")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_losses_gradients_and_weights(
    checkpoint: Path, draft: str, single: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    _check_layout(LAYOUTS[layout], checkpoint, draft, single, tmp_path)


# Stages in the middle have neither end of the model. A draft reads layers of all stages.
DEEP_LAYOUTS = {
    "pp3, uneven": (Layout(pp=3, last=1), 5, False),
    "pp4, tied": (Layout(pp=4), 4, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP_LAYOUTS)
def test_pipelines_with_stages_in_the_middle_give_the_same(draft: str, name: str, tmp_path: Path) -> None:
    layout, num_layers, tied = DEEP_LAYOUTS[name]
    checkpoint = write_model(tmp_path / "model", draft, tied=tied, num_layers=num_layers)
    single = train(checkpoint, draft, tmp_path / "single")[0]
    _check_layout(layout, checkpoint, draft, single, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_layouts_of_four_ranks_give_the_same(
    checkpoint: Path, draft: str, single: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    _check_layout(LARGE_LAYOUTS[layout], checkpoint, draft, single, tmp_path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mixture") / "model", "dflash", has_experts=True)


@pytest.fixture(scope="module")
def single_mixture(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(mixture, "dflash", tmp_path_factory.mktemp("single") / "ranks")[0]


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_on_several_ranks_give_the_same(
    mixture: Path, single_mixture: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    _check_layout(EXPERT_LAYOUTS[layout], mixture, "dflash", single_mixture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_EXPERT_LAYOUTS)
def test_experts_on_four_ranks_give_the_same(
    mixture: Path, single_mixture: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    _check_layout(LARGE_EXPERT_LAYOUTS[layout], mixture, "dflash", single_mixture, tmp_path)


def _check_layout(layout: Layout, checkpoint: Path, draft: str, single: dict[str, Any], tmp_path: Path) -> None:
    records = train(checkpoint, draft, tmp_path / "ranks", layout)
    for component in COMPONENTS:
        names = {name for record in records for name in record["gradients"][0][component]}
        assert names == single["gradients"][0][component].keys()
    for rank, record in enumerate(records):
        for step in range(NUM_STEPS):
            where = f"rank {rank}, step {step}"
            mine, theirs = record["metrics"][step], single["metrics"][step]
            if record["is_last_stage"]:
                assert mine == pytest.approx(theirs, abs=TOLERANCE, rel=TOLERANCE), where
            assert mine["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=TOLERANCE), where
            for component in COMPONENTS:
                gradients = record["gradients"][step][component], single["gradients"][step][component]
                # An expert with few tokens has a small gradient. Later ones come of weights that rounding has moved.
                own, others = gradients if step == 0 else map(_by_parameter, gradients)
                _assert_gradients_equal(own, others, where)
        # After a few updates that are equal but for rounding.
        for name in ("scores", "logprobs") if record["is_last_stage"] else ():
            torch.testing.assert_close(record[name], single[name], atol=WEIGHT_TOLERANCE * 100, rtol=0)
        for component in COMPONENTS:
            _assert_weights_equal(record["weights"][component], single, component, f"rank {rank}")
