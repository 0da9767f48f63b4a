"""Properties of every draft: packing changes nothing, isolation, batches without a target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spawn import run_distributed
from tiny_checkpoints import VOCAB_SIZE, make_config, write_model

from skyrl_spec.drafts.base import BatchTokens, Teacher
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.models.policy import document_mask
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

pytestmark = pytest.mark.parametrize("draft", ["mtp", "dflash"])


def _trainer(path: Path, draft: str) -> PolicyTrainer:
    ranks = parallel.lay_out(1, torch.device("cpu"))
    return PolicyTrainer(make_config(path, draft=draft), load_spec(str(path)), ranks, total_optimizer_steps=1)


def _targets(token_ids_BS: torch.Tensor, segment_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor) -> BatchTokens:
    return BatchTokens(token_ids_BS, segment_ids_BS, loss_mask_BS, document_mask(segment_ids_BS))


def _teacher(trainer: PolicyTrainer, hidden_SBD: torch.Tensor) -> Teacher:
    return Teacher(hidden_SBD.detach(), trainer.model.output_weight_vD().detach(), trainer.model.embed)


def _loss(trainer: PolicyTrainer, targets: BatchTokens) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss (a sum, not a mean), gradients and sums of one forward pass."""
    assert trainer.draft is not None
    draft = trainer.draft.draft
    draft.module.zero_grad(set_to_none=True)
    with capture(trainer.model, draft.capture_points) as captured:
        with captured.listening():
            hidden_SBD = trainer.model(targets.token_ids, targets.attention_mask)
        supervision = draft.supervise(targets)
        loss, sums = draft.loss(
            captured.take(), _teacher(trainer, hidden_SBD), supervision, torch.ones((), dtype=torch.float64)
        )
    gradients = torch.autograd.grad(loss, list(draft.module.parameters()))
    names = [name for name, _ in draft.module.named_parameters()]
    return loss.detach(), dict(zip(names, gradients, strict=True)), sums.flat()


def _check_packing(_rank: int, path: Path, draft: str) -> None:
    trainer = _trainer(path, draft)
    rng = np.random.default_rng(0)
    lengths, prompts = (9, 5, 12), (3, 2, 6)
    documents = [torch.as_tensor(rng.integers(0, VOCAB_SIZE, length)) for length in lengths]
    masks = [torch.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)]
    # An observation in the middle of a response takes no part in drafts.
    masks[2][9] = False

    packed_ids = torch.cat([*documents, torch.zeros(2, dtype=torch.long)])[None]
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)] + [torch.zeros(2, dtype=torch.long)])
    packed_mask = torch.cat([*masks, torch.zeros(2, dtype=torch.bool)])[None]
    packed = _loss(trainer, _targets(packed_ids, segments[None], packed_mask))

    apart = [
        _loss(trainer, _targets(ids[None], torch.ones_like(ids)[None], mask[None]))
        for ids, mask in zip(documents, masks, strict=True)
    ]
    assert abs(packed[0] - sum(part[0] for part in apart)) < 1e-4
    for name, gradient in packed[1].items():
        assert (gradient - sum(part[1][name] for part in apart)).abs().max() < 1e-4, name
    torch.testing.assert_close(packed[2], sum(part[2] for part in apart), atol=1e-4, rtol=1e-5)


def test_packed_documents_give_the_loss_and_gradients_of_documents_apart(tmp_path: Path, draft: str) -> None:
    run_distributed(_check_packing, 1, write_model(tmp_path / "model", draft), draft)


def _check_isolation(_rank: int, path: Path, draft: str) -> None:
    trainer = _trainer(path, draft)
    assert trainer.draft is not None
    token_ids = torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None].expand(2, -1) >= 4
    trained = trainer.draft.draft
    assert trainer.policy is not None
    trainer.policy.zero_grad()
    with capture(trainer.model, trained.capture_points) as captured:
        trainer.model(token_ids)
        assert captured.take() == {}, "captured without being asked to"
        with captured.listening():
            hidden_SBD = trainer.model(token_ids)
        tensors = captured.take()
        assert captured.take() == {}, "the hooks keep the last batch alive"
    assert all(not tensor.requires_grad and tensor.grad_fn is None for tensor in tensors.values())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
    assert sum(hooks) == 0, "hooks stay behind"
    supervision = trained.supervise(_targets(token_ids, torch.ones_like(token_ids), mask))
    loss, _ = trained.loss(tensors, _teacher(trainer, hidden_SBD), supervision, torch.ones(()).double())
    loss.backward()
    assert all(p.main_grad.abs().max() == 0 and p.grad is None for p in trainer.model.parameters())
    assert all(p.main_grad.abs().max() > 0 for p in trained.module.parameters())


def test_the_drafts_gradient_reaches_every_parameter_of_its_own_and_none_of_the_policy(
    tmp_path: Path, draft: str
) -> None:
    run_distributed(_check_isolation, 1, write_model(tmp_path / "model", draft), draft)


def _check_no_targets(_rank: int, path: Path, draft: str) -> None:
    trainer = _trainer(path, draft)
    token_ids = torch.randint(0, VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(token_ids, dtype=torch.bool)
    loss, gradients, sums = _loss(trainer, _targets(token_ids, torch.ones_like(token_ids), nothing))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
    assert sums.abs().max() == 0


def test_a_batch_without_targets_gives_a_connected_zero(tmp_path: Path, draft: str) -> None:
    run_distributed(_check_no_targets, 1, write_model(tmp_path / "model", draft), draft)
