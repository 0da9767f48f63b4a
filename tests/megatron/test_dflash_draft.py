"""Megatron DFlash draft against its definition, block by block, and its two attention kernels against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dflash_reference import DflashReference
from spawn import run_distributed
from tiny_checkpoints import VOCAB_SIZE, dflash_path, make_config, write_model

from skyrl_spec.drafts.base import BatchTokens, Teacher
from skyrl_spec.drafts.block_attention import flex_block_attention, sdpa_block_attention
from skyrl_spec.drafts.blocks import draw_blocks
from skyrl_spec.drafts.dflash import DflashDraft
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.models.conversion import export_weights
from skyrl_spec.models.policy import document_mask
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

TOLERANCE = 1e-5


def _check_reference(_rank: int, path: Path, tp: int) -> None:
    """Outputs of all blocks of two packed rows and their gradients, against the definition."""
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    trainer = PolicyTrainer(make_config(path, draft="dflash", tp=tp), load_spec(str(path)), ranks, 1)
    assert trainer.draft is not None
    draft = trainer.draft.draft
    assert isinstance(draft, DflashDraft)
    reference = DflashReference(dflash_path(path))
    token_ids = torch.randint(0, VOCAB_SIZE - 1, (2, 21), generator=torch.Generator().manual_seed(0))
    # The first row is one document, the second two.
    segments = torch.ones_like(token_ids)
    segments[1, 9:] = 2
    loss_mask = torch.arange(21)[None].expand(2, -1) >= 3
    targets = BatchTokens(token_ids, segments, loss_mask.clone(), document_mask(segments))
    with capture(trainer.model, draft.capture_points) as captured:
        with torch.no_grad(), captured.listening():
            hidden_SBD = trainer.model(token_ids, targets.attention_mask)
        trunk = captured.take()
    teacher = Teacher(hidden_SBD, trainer.model.output_weight_vD(), trainer.model.embed)
    supervision = draft.supervise(targets)
    out_QBD = draft.forward(trunk, teacher, supervision)
    slots = supervision.blocks.num_slots
    out_BAsD = out_QBD.transpose(0, 1).unflatten(1, (-1, slots))
    weights = torch.randn(out_BAsD.shape, generator=torch.Generator().manual_seed(1))

    expected_loss, num_blocks, loss = torch.zeros(()), 0, torch.zeros(())
    for row, block in supervision.blocks.supervised_BAK.any(-1).nonzero().tolist():
        anchor = int(supervision.blocks.anchor_BA[row, block])
        start = int((segments[row] == segments[row, anchor]).nonzero()[0])
        aux = torch.stack([trunk[point][start:, row] for point in draft.capture_points], dim=1)
        ids = torch.tensor([int(token_ids[row, anchor])] + [reference.mask_token] * (slots - 1))
        expected = reference.draft_hidden(aux, trainer.model.embed(ids), anchor - start)
        mine = out_BAsD[row, block]
        # Slot 0 is not used.
        assert (mine - expected)[1:].abs().max() < TOLERANCE, (row, anchor)
        loss = loss + (mine * weights[row, block])[1:].sum()
        expected_loss = expected_loss + (expected * weights[row, block])[1:].sum()
        num_blocks += 1
    assert num_blocks > 20
    expected_loss.backward()
    parameters = dict(draft.module.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    # Megatron sums these gradients over tensor-parallel ranks at the end of a step.
    for name, gradient in gradients.items():
        if "q_layernorm" in name or "k_layernorm" in name:
            torch.distributed.all_reduce(gradient, group=ranks.tp_group)
    stand_in = torch.nn.Module()
    stand_in.named_parameters = lambda: gradients.items()  # type: ignore[method-assign,assignment]
    for name, gradient in export_weights(stand_in, draft.rules, ranks):
        expected_gradient = reference.weights[name].grad
        assert expected_gradient is not None
        assert (gradient - expected_gradient).abs().max() < 1e-4 * expected_gradient.abs().max(), name


@pytest.mark.parametrize("tp", [1, 2])
def test_blocks_and_gradients_are_those_of_the_definition(tmp_path: Path, tp: int) -> None:
    run_distributed(_check_reference, tp, write_model(tmp_path / "model", "dflash"), tp)


def _check_round_trip(_rank: int, path: Path) -> None:
    ranks = parallel.lay_out(2, torch.device("cpu"))
    trainer = PolicyTrainer(make_config(path, draft="dflash", tp=2), load_spec(str(path)), ranks, 1)
    weights = DflashReference(dflash_path(path)).weights
    exported = dict(trainer.export("draft"))
    assert exported.keys() == weights.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, weights[name]), name
    shapes = {name: (dtype, shape) for name, dtype, shape in trainer.export_shapes("draft")}
    assert shapes == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in exported.items()}


def test_what_is_loaded_is_exported_bit_by_bit(tmp_path: Path) -> None:
    run_distributed(_check_round_trip, 2, write_model(tmp_path / "model", "dflash"))


def test_sdpa_with_a_mask_equals_flex_attention() -> None:
    """Outputs only: FlexAttention has no backward pass on a CPU. tests/gpu compares gradients."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[1] * 7 + [2] * 9 + [0] * 2, [1] * 16 + [0] * 2])
    loss_mask = (segments > 0) & (torch.arange(18) % 7 > 1)
    blocks = draw_blocks(loss_mask, segments, 5, 3, generator)
    num_slots = blocks.anchor_BA.shape[1] * blocks.num_slots
    query = torch.randn(2, 4, num_slots, 32, generator=generator)
    key, value = (torch.randn(2, 2, 18 + num_slots, 32, generator=generator) for _ in range(2))
    outputs = [
        build(blocks, segments)(query, key, value, 0.2) for build in (sdpa_block_attention, flex_block_attention)
    ]
    assert torch.isfinite(outputs[0]).all()
    assert (outputs[0] - outputs[1]).abs().max() < TOLERANCE
