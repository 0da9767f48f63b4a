"""``trainer.dry_run``'s memory of a worker and size of a checkpoint, against real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model

from skyrl_spec.checkpoint import dist, pieces
from skyrl_spec.models import parallel
from skyrl_spec.planning.memory import plan_memory
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(trainer: PolicyTrainer) -> int:
    """Bytes of moments and fp32 masters on this rank."""
    held: dict[int, torch.Tensor] = {}
    for part in trainer.saved_components().values():
        for optimizer in getattr(part.trainable.optimizer, "chained_optimizers", [part.trainable.optimizer]):
            parameters = {id(p) for p in part.trainable.module.parameters()}
            for parameter, state in optimizer.optimizer.state.items():
                held |= {id(t): t for t in state.values() if isinstance(t, torch.Tensor) and t.ndim > 0}
                # In fp32 the optimizer updates the parameters or views of them.
                if id(parameter) not in parameters and parameter._base is None:
                    held[id(parameter)] = parameter
    return nbytes(list(held.values()))


def compare(rank: int, model: Path, root: Path, draft: str, tp: int, dtype: str, distributed: bool) -> None:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    config = make_config(model, draft=draft, tp=tp, dtype=dtype, distributed=distributed)
    config.trainer.placement.policy_num_gpus_per_node = 2
    config.trainer.algorithm.use_kl_loss = True
    trainer = PolicyTrainer(config, load_spec(str(model)), ranks, total_optimizer_steps=10)
    trainer.train_mini_batch(make_batch(0))
    plan = plan_memory(config).worker
    trained = list(trainer.saved_components().values())
    assert plan.weights == nbytes([p for part in trained for p in part.trainable.module.parameters()])
    buffers = [b.grad_data for part in trained for b in part.trainable.ddp.buffers]
    # A distributed optimizer's buffer is padded.
    assert plan.gradients <= nbytes(buffers) <= plan.gradients * (1.05 if distributed else 1)
    assert trainer.reference is not None
    assert plan.reference == nbytes(list(trainer.reference.parameters()))
    found = torch.tensor(float(optimizer_bytes(trainer)))
    torch.distributed.all_reduce(found)
    # Ranges of a distributed optimizer need not be equal.
    assert abs(float(found) / 2 / plan.optimizer - 1) < (0.05 if distributed else 1e-6), (float(found), plan.optimizer)
    # Rank 0 writes everything that it has, unless the optimizer's state is divided. Padding is not counted there.
    config.trainer.policy.megatron_config.async_dist_ckpt_save = True
    copies = pieces.main_replicas(pieces.sharded(trainer.saved_components()), copies=True)
    written, planned = nbytes([piece.data for piece in copies.values()]), plan_memory(config).checkpoint_copies
    assert written <= planned * 1.05
    assert rank > 0 or written > planned * 0.9
    dist.save(root / "step_1", trainer.saved_components(), {})
    if rank == 0:
        files = sum(path.stat().st_size for path in (root / "step_1").glob("*.distcp"))
        # Every stored tensor has a header.
        assert plan_memory(config).checkpoint < files < plan_memory(config).checkpoint * 1.3


@pytest.mark.parametrize(
    ("draft", "tp", "dtype", "distributed"),
    [("mtp", 2, "bf16", False), ("dflash", 1, "fp32", True), ("mtp", 1, "bf16", True), ("dflash", 2, "fp32", False)],
)
def test_the_plan_is_what_a_worker_holds(draft: str, tp: int, dtype: str, distributed: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", draft)
    run_distributed(compare, 2, model, tmp_path, draft, tp, dtype, distributed)
