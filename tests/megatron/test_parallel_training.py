"""What a mini-batch trains does not depend on the parallel layout.

Real PolicyTrainers on real gloo processes; every rank writes what it has, the test compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.models.conversion import export_weights
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

# fp32, sums in another order.
TOLERANCE = 1e-5


def _gradients(trainer: PolicyTrainer, which: str) -> dict[str, torch.Tensor]:
    """Full gradients by HF name."""
    module, rules = trainer._exported(which)  # type: ignore[arg-type]
    # Export reads parameters: let it read the gradient buffer in their place.
    stand_in = torch.nn.Module()
    gradients = {name: parameter.main_grad.clone() for name, parameter in module.named_parameters()}
    stand_in.named_parameters = lambda: gradients.items()  # type: ignore[method-assign,assignment]
    return dict(export_weights(stand_in, rules, trainer.parallel))


def _train(rank: int, path: Path, out: Path, tp: int, options: dict[str, Any], num_steps: int) -> None:
    torch.manual_seed(0)
    config = make_config(path, tp=tp, **options)
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    record: dict[str, Any] = {"metrics": [], "gradients": []}
    for step in range(num_steps):
        batch = make_batch(seed=step)
        sums = trainer.forward_backward(batch)
        components = ("policy", "draft") if trainer.draft is not None else ("policy",)
        # The distributed optimizer leaves a rank the sum of its own shard alone.
        if not options.get("distributed"):
            record["gradients"].append({which: _gradients(trainer, which) for which in components})
        record["metrics"].append(values(trainer._reduce(sums) | trainer.optimizer_step()))
    record["weights"] = {which: dict(trainer.export(which)) for which in components}  # type: ignore[arg-type]
    if rank == 0:
        torch.save(record, out)


def train(path: Path, out: Path, *, tp: int = 1, dp: int = 1, num_steps: int = 3, **options: Any) -> dict[str, Any]:
    run_distributed(_train, tp * dp, path, out, tp, options, num_steps)
    return torch.load(out, weights_only=True)


def _assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < TOLERANCE, name


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module", params=["mtp", "dflash"])
def draft(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(draft: str, tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint") / "model", draft, tied=tied)


def test_every_layout_gives_the_same_losses_gradients_and_weights(checkpoint: Path, draft: str, tmp_path: Path) -> None:
    single = train(checkpoint, tmp_path / "single.pt", draft=draft)
    layouts = {
        "tp2": train(checkpoint, tmp_path / "tp2.pt", draft=draft, tp=2),
        "dp2": train(checkpoint, tmp_path / "dp2.pt", draft=draft, dp=2),
        "dp2, distributed optimizer": train(checkpoint, tmp_path / "dist.pt", draft=draft, dp=2, distributed=True),
    }
    for layout, other in layouts.items():
        for mine, theirs in zip(single["metrics"], other["metrics"], strict=True):
            assert mine == pytest.approx(theirs, abs=TOLERANCE, rel=1e-4), layout
        for mine, theirs in zip(single["gradients"], other["gradients"], strict=False):
            for which in ("policy", "draft"):
                _assert_close(mine[which], theirs[which])
        # Adam divides by the root of the gradient's own size: what is rounding in one is a step of the learning rate.
        for which in ("policy", "draft"):
            for name, tensor in single["weights"][which].items():
                assert (tensor - other["weights"][which][name]).abs().mean() < 1e-4, (layout, name)
