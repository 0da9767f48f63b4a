"""Properties of every draft: packing changes nothing, isolation, batches without a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import loss_mask_rows, make_config, make_pack, random_documents, write_model

from skyrl_spec.drafts import shares
from skyrl_spec.drafts.base import Supervision, Teacher, num_sums
from skyrl_spec.drafts.dflash import DflashSupervision
from skyrl_spec.drafts.mtp import MtpSupervision
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

pytestmark = pytest.mark.parametrize("draft", ["mtp", "dflash"])


def _trainer(path: Path, draft: str, tp: int = 1) -> PolicyTrainer:
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    return PolicyTrainer(make_config(path, draft=draft, tp=tp), load_spec(str(path)), ranks, total_optimizer_steps=1)


def _teacher(trainer: PolicyTrainer, hidden_TD: torch.Tensor) -> Teacher:
    return Teacher(hidden_TD.detach(), trainer.model.output_weight_vD().detach(), trainer.model.embed)


def _loss(
    trainer: PolicyTrainer, pack: Pack, rows: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """``_sum_of`` what is drawn for a pack. The step has begun."""
    assert trainer.draft is not None
    return _sum_of(trainer, pack, trainer.draft.draft.supervise(pack, rows))


def _sum_of(
    trainer: PolicyTrainer, pack: Pack, supervisions: Sequence[Supervision]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss (a sum, not a mean), gradients and sums of one forward pass of the trunk."""
    assert trainer.draft is not None
    draft = trainer.draft.draft
    with capture(trainer.model, draft.capture_points) as captured:
        with captured.listening():
            hidden_TD = trainer.model(pack)
        states, teacher = captured.take(), _teacher(trainer, hidden_TD)
    parts = [
        draft.loss(states, teacher, pack, supervision, torch.ones((), dtype=torch.float64))
        for supervision in supervisions
    ]
    zero = torch.zeros((), requires_grad=True)
    loss = torch.stack([zero, *(part for part, _ in parts)]).sum()
    gradients = torch.autograd.grad(loss, list(draft.module.parameters()), allow_unused=True, materialize_grads=True)
    names = [name for name, _ in draft.module.named_parameters()]
    sums = torch.stack([torch.zeros(num_sums(draft.num_positions)), *(sums.flat() for _, sums in parts)]).sum(dim=0)
    return loss.detach(), dict(zip(names, gradients, strict=True)), sums


def _check_packing(_rank: int, path: Path, draft: str, share: float) -> None:
    shares.SMALLEST_WINDOW = 2
    trainer = _trainer(path, draft)
    assert trainer.draft is not None
    trainer.draft.draft.config.positions_per_step = share
    documents, prompts = random_documents(9, 5, 1, 12, 2), (3, 2, 1, 6, 1)
    masks = [[i >= prompt for i in range(len(ids))] for ids, prompt in zip(documents, prompts, strict=True)]
    # An observation in the middle of a response takes no part in drafts.
    masks[3][9] = False
    mask_rows = np.zeros((5, 12), bool)
    for row, mask in zip(mask_rows, masks, strict=True):
        row[: len(mask)] = mask
    trainer.draft.draft.begin_step(mask_rows)

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


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_packed_documents_give_the_loss_and_gradients_of_documents_apart(
    tmp_path: Path, draft: str, share: float
) -> None:
    run_distributed(_check_packing, 1, write_model(tmp_path / "model", draft), draft, share)


def _check_share(_rank: int, path: Path, draft: str, tp: int) -> None:
    """A part of the positions, read from a part of the tokens, against the same part of all positions."""
    shares.SMALLEST_WINDOW = 3
    trainer = _trainer(path, draft, tp)
    assert trainer.draft is not None
    trained, pack = trainer.draft.draft, make_pack(*random_documents(21, 9, 2, 12), trained_from=3)
    trained.begin_step(loss_mask_rows(pack))
    wholes = trained.supervise(pack, range(4))
    trained.config.positions_per_step = 0.3
    trained.begin_step(loss_mask_rows(pack))
    parts = trained.supervise(pack, range(4))
    assert 0 < sum(part.weight for part in parts) < 0.6 * sum(whole.weight for whole in wholes)
    got = _sum_of(trainer, pack, parts)
    wanted = _sum_of(trainer, pack, [_restricted(whole, parts) for whole in wholes])
    torch.testing.assert_close(got[0], wanted[0], atol=0, rtol=1e-5)
    for name, gradient in got[1].items():
        assert (gradient - wanted[1][name]).norm() < 1e-5 * wanted[1][name].norm(), name
    torch.testing.assert_close(got[2][2:], wanted[2][2:], atol=1e-9, rtol=1e-5)


def _restricted(whole: Supervision, parts: Sequence[Supervision]) -> Supervision:
    """``whole`` with the weights and masks of ``parts``."""
    if isinstance(whole, MtpSupervision):
        (part,) = parts
        assert isinstance(part, MtpSupervision)
        kept_KN = part.mask_KT[:, whole.position_N]
        return replace(whole, mask_KT=part.mask_KT, mask_KN=kept_KN, is_counted_T=part.is_counted_T)
    assert isinstance(whole, DflashSupervision)
    drawn = {int(part.token_S[anchor]) for part in parts for anchor in part.blocks.anchors}
    is_drawn_A = torch.tensor([int(whole.token_S[anchor]) in drawn for anchor in whole.blocks.anchors])
    blocks = replace(whole.blocks, supervised_AK=whole.blocks.supervised_AK & is_drawn_A[:, None])
    return replace(whole, blocks=blocks, weight_N=whole.weight_N * is_drawn_A[whole.block_N])


@pytest.mark.parametrize("tp", [1, 2])
def test_a_share_of_the_positions_gives_their_part_of_the_loss_and_of_the_gradients(
    tmp_path: Path, draft: str, tp: int
) -> None:
    run_distributed(_check_share, tp, write_model(tmp_path / "model", draft), draft, tp)


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
    trained.begin_step(loss_mask_rows(pack))
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
    trainer, pack = _trainer(path, draft), make_pack(*random_documents(6, 1), trained_from=9)
    assert trainer.draft is not None
    trainer.draft.draft.begin_step(loss_mask_rows(pack))
    assert trainer.draft.draft.supervise(pack, [0, 1]) == ()
    loss, gradients, sums = _loss(trainer, pack, [0, 1])
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
    assert sums.abs().max() == 0


def test_a_batch_without_targets_costs_nothing_and_gives_zero(tmp_path: Path, draft: str) -> None:
    run_distributed(_check_no_targets, 1, write_model(tmp_path / "model", draft), draft)
