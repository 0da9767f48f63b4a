"""Megatron DFlash draft against its definition, block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dflash_reference import DflashReference
from spawn import run_distributed
from tiny_checkpoints import dflash_path, loss_mask_rows, make_config, make_pack, random_documents, write_model

from skyrl_spec.drafts.base import Teacher
from skyrl_spec.drafts.dflash import DflashDraft
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.models.conversion import export_weights
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

TOLERANCE = 1e-5


def _check_reference(_rank: int, path: Path, tp: int) -> None:
    """Outputs of all blocks of a pack and their gradients, against the definition."""
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    trainer = PolicyTrainer(make_config(path, draft="dflash", tp=tp), load_spec(str(path)), ranks, 1)
    assert trainer.draft is not None
    draft = trainer.draft.draft
    assert isinstance(draft, DflashDraft)
    reference = DflashReference(dflash_path(path))
    pack = make_pack(*random_documents(21, 9, 2, 12), trained_from=3)
    with capture(trainer.model, draft.capture_points) as captured:
        with torch.no_grad(), captured.listening():
            hidden_TD = trainer.model(pack)
        trunk = captured.take()
    teacher = Teacher(hidden_TD, trainer.model.output_weight_vD(), trainer.model.embed)

    expected_loss, num_blocks, loss = torch.zeros(()), 0, torch.zeros(())
    draft.begin_step(loss_mask_rows(pack))
    supervisions = draft.supervise(pack, range(4))
    assert len(supervisions) > 1, "all blocks fit into one pass"
    for supervision in supervisions:
        blocks, read = supervision.blocks, {point: states[supervision.token_S] for point, states in trunk.items()}
        context_SD = draft.context(trunk, pack, supervision.token_S)
        out_AsD = draft.forward(context_SD, teacher, supervision.read, blocks).unflatten(0, (-1, blocks.num_slots))
        weights = torch.randn(out_AsD.shape, generator=torch.Generator().manual_seed(1))
        for block, (anchor, start) in enumerate(zip(blocks.anchors, blocks.starts, strict=True)):
            aux = torch.stack([read[point][start:] for point in draft.capture_points], dim=1)
            ids = torch.tensor(
                [int(supervision.read.token_ids_T[anchor])] + [reference.mask_token] * (blocks.num_slots - 1)
            )
            expected = reference.draft_hidden(aux, trainer.model.embed(ids), anchor - start)
            # Slot 0 is not used.
            assert (out_AsD[block] - expected)[1:].abs().max() < TOLERANCE, anchor
            loss = loss + (out_AsD[block] * weights[block])[1:].sum()
            expected_loss = expected_loss + (expected * weights[block])[1:].sum()
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
    shapes = {name: (dtype, shape) for name, dtype, shape in trainer.exports.shapes("draft")}
    assert shapes == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in exported.items()}


def test_what_is_loaded_is_exported_bit_by_bit(tmp_path: Path) -> None:
    run_distributed(_check_round_trip, 2, write_model(tmp_path / "model", "dflash"))
