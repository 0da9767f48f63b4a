"""Properties of every draft: packing changes nothing, isolation, batches without a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import make_config, make_pack, random_documents, write_model

from skyrl_spec.drafts.base import Teacher
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

pytestmark = pytest.mark.parametrize("draft", ["mtp", "dflash"])


def _trainer(path: Path, draft: str) -> PolicyTrainer:
    ranks = parallel.lay_out(1, torch.device("cpu"))
    return PolicyTrainer(make_config(path, draft=draft), load_spec(str(path)), ranks, total_optimizer_steps=1)


def _teacher(trainer: PolicyTrainer, hidden_TD: torch.Tensor) -> Teacher:
    return Teacher(hidden_TD.detach(), trainer.model.output_weight_vD().detach(), trainer.model.embed)


def _loss(
    trainer: PolicyTrainer, pack: Pack, rows: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss (a sum, not a mean), gradients and sums of one forward pass."""
    assert trainer.draft is not None
    draft = trainer.draft.draft
    with capture(trainer.model, draft.capture_points) as captured:
        with captured.listening():
            hidden_TD = trainer.model(pack)
        states, teacher = captured.take(), _teacher(trainer, hidden_TD)
    parts = [
        draft.loss(states, teacher, pack, supervision, torch.ones((), dtype=torch.float64))
        for supervision in draft.supervise(pack, rows)
    ]
    loss = torch.stack([part for part, _ in parts]).sum()
    gradients = torch.autograd.grad(loss, list(draft.module.parameters()))
    names = [name for name, _ in draft.module.named_parameters()]
    sums = torch.stack([sums.flat() for _, sums in parts]).sum(dim=0)
    return loss.detach(), dict(zip(names, gradients, strict=True)), sums


def _check_packing(_rank: int, path: Path, draft: str) -> None:
    trainer = _trainer(path, draft)
    documents, prompts = random_documents(9, 5, 1, 12, 2), (3, 2, 1, 6, 1)
    masks = [[i >= prompt for i in range(len(ids))] for ids, prompt in zip(documents, prompts, strict=True)]
    # An observation in the middle of a response takes no part in drafts.
    masks[3][9] = False

    def loss_of(rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        parts = [np.concatenate([values[row] for row in rows]) for values in (documents, masks)]
        return _loss(trainer, pack_documents(*parts, [len(documents[row]) for row in rows]), rows)

    apart = [loss_of([row]) for row in range(5)]
    for order in (range(5), (3, 1, 4, 0, 2)):
        loss, gradients, sums = loss_of(order)
        torch.testing.assert_close(loss, sum(part[0] for part in apart), atol=0, rtol=1e-5)
        for name, gradient in gradients.items():
            wanted = sum(part[1][name] for part in apart)
            assert (gradient - wanted).norm() < 1e-5 * wanted.norm(), name
        torch.testing.assert_close(sums, sum(part[2] for part in apart), atol=1e-9, rtol=1e-5)


def test_packed_documents_give_the_loss_and_gradients_of_documents_apart(tmp_path: Path, draft: str) -> None:
    run_distributed(_check_packing, 1, write_model(tmp_path / "model", draft), draft)


def _check_isolation(_rank: int, path: Path, draft: str) -> None:
    trainer = _trainer(path, draft)
    assert trainer.draft is not None
    pack = make_pack(*random_documents(12, 10), trained_from=4)
    trained = trainer.draft.draft
    assert trainer.policy is not None
    trainer.policy.zero_grad()
    with capture(trainer.model, trained.capture_points) as captured:
        trainer.model(pack)
        assert captured.take() == {}, "captured without being asked to"
        with captured.listening():
            hidden_TD = trainer.model(pack)
        tensors = captured.take()
        assert captured.take() == {}, "the hooks keep the last batch alive"
    assert all(not tensor.requires_grad and tensor.grad_fn is None for tensor in tensors.values())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
    assert sum(hooks) == 0, "hooks stay behind"
    for supervision in trained.supervise(pack, [0, 1]):
        loss, _ = trained.loss(tensors, _teacher(trainer, hidden_TD), pack, supervision, torch.ones(()).double())
        loss.backward()
    assert all(p.main_grad.abs().max() == 0 and p.grad is None for p in trainer.model.parameters())
    assert all(p.main_grad.abs().max() > 0 for p in trained.module.parameters())


def test_the_drafts_gradient_reaches_every_parameter_of_its_own_and_none_of_the_policy(
    tmp_path: Path, draft: str
) -> None:
    run_distributed(_check_isolation, 1, write_model(tmp_path / "model", draft), draft)


def _check_no_targets(_rank: int, path: Path, draft: str) -> None:
    trainer = _trainer(path, draft)
    loss, gradients, sums = _loss(trainer, make_pack(*random_documents(6, 1), trained_from=9), [0, 1])
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
    assert sums.abs().max() == 0


def test_a_batch_without_targets_gives_a_connected_zero(tmp_path: Path, draft: str) -> None:
    run_distributed(_check_no_targets, 1, write_model(tmp_path / "model", draft), draft)
