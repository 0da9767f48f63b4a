"""The Megatron draft against the plain PyTorch head, and its alignment and isolation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mtp_reference import MtpHead
from safetensors.torch import load_file
from spawn import run_distributed
from tiny_checkpoints import VOCAB_SIZE, make_config, tiny_config, write_checkpoint

from skyrl_spec.drafts import chain_attention
from skyrl_spec.drafts.base import Targets, Teacher
from skyrl_spec.drafts.mtp import EMBEDDING, TRUNK_HIDDEN
from skyrl_spec.megatron import parallel
from skyrl_spec.megatron.capture import capture
from skyrl_spec.megatron.model import document_mask
from skyrl_spec.megatron.trainer import PolicyTrainer
from skyrl_spec.model_spec import load_spec

TOLERANCE = 1e-5
NUM_DEPTHS = 3


def _trainer(path: Path) -> PolicyTrainer:
    ranks = parallel.lay_out(1, torch.device("cpu"))
    return PolicyTrainer(make_config(path), load_spec(str(path)), ranks, total_optimizer_steps=1)


def _targets(token_ids_BS: torch.Tensor, segment_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor) -> Targets:
    return Targets(token_ids_BS, segment_ids_BS, loss_mask_BS, document_mask(segment_ids_BS))


def _loss(trainer: PolicyTrainer, targets: Targets) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Summed (not averaged) loss, gradients and sums of one forward pass."""
    assert trainer.draft is not None
    draft = trainer.draft.draft
    draft.module.zero_grad(set_to_none=True)
    with capture(trainer.model, draft.capture_points) as captured:
        hidden_SBD = trainer.model(targets.token_ids, targets.attention_mask)
        teacher = Teacher(hidden_SBD.detach(), trainer.model.output_weight_vD().detach())
        loss, sums = draft.loss(captured.take(), teacher, targets, torch.ones((), dtype=torch.float64))
    gradients = torch.autograd.grad(loss, list(draft.module.parameters()))
    names = [name for name, _ in draft.module.named_parameters()]
    return loss.detach(), dict(zip(names, gradients, strict=True)), sums.stack()


def _check_reference(_rank: int, path: Path) -> None:
    trainer = _trainer(path)
    assert trainer.draft is not None
    draft = trainer.draft.draft
    head = MtpHead(tiny_config("MiMoForCausalLM", tied=False))
    prefix = "model.mtp_layers.0."
    weights = load_file(path / "model.safetensors")
    head.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
    for seq_len in (2, 7, 19):
        token_ids = torch.randint(0, VOCAB_SIZE, (2, seq_len), generator=torch.Generator().manual_seed(seq_len))
        ones = torch.ones_like(token_ids)
        with torch.no_grad(), capture(trainer.model, draft.capture_points) as captured:
            trainer.model(token_ids)
            trunk = captured.take()
            outputs = draft.forward(trunk[TRUNK_HIDDEN], trunk[EMBEDDING], _targets(token_ids, ones, ones.bool()))
            expected = head(trunk[TRUNK_HIDDEN].transpose(0, 1), trunk[EMBEDDING].transpose(0, 1), NUM_DEPTHS)
        for depth, (mine, theirs) in enumerate(zip(outputs, expected, strict=True), start=1):
            # The last tokens have no token t+d to look at.
            difference = (mine.transpose(0, 1) - theirs)[:, : max(seq_len - depth, 0)].abs()
            assert difference.numel() == 0 or difference.max() < TOLERANCE, depth


def test_every_depth_equals_the_plain_head(tmp_path: Path) -> None:
    run_distributed(_check_reference, 1, write_checkpoint(tmp_path / "model"))


def _check_packing(_rank: int, path: Path) -> None:
    trainer = _trainer(path)
    rng = np.random.default_rng(0)
    lengths, prompts = (9, 5, 12), (3, 2, 6)
    documents = [torch.as_tensor(rng.integers(0, VOCAB_SIZE, length)) for length in lengths]
    masks = [torch.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)]
    # An observation in the middle of a response is never drafted to nor from.
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


def test_packed_documents_give_the_loss_and_gradients_of_documents_apart(tmp_path: Path) -> None:
    run_distributed(_check_packing, 1, write_checkpoint(tmp_path / "model"))


def _check_isolation(_rank: int, path: Path) -> None:
    trainer = _trainer(path)
    assert trainer.draft is not None
    token_ids = torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None].expand(2, -1) >= 4
    draft = trainer.draft.draft
    trainer.policy.zero_grad()
    with capture(trainer.model, draft.capture_points) as captured:
        hidden_SBD = trainer.model(token_ids)
        tensors = captured.take()
        assert captured.take() == {}, "the hooks keep the last batch alive"
    assert all(not tensor.requires_grad and tensor.grad_fn is None for tensor in tensors.values())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
    assert sum(hooks) == 0, "hooks stay behind"
    teacher = Teacher(hidden_SBD.detach(), trainer.model.output_weight_vD().detach())
    loss, _ = draft.loss(
        tensors, teacher, _targets(token_ids, torch.ones_like(token_ids), mask), torch.ones(()).double()
    )
    loss.backward()
    assert all(p.main_grad.abs().max() == 0 and p.grad is None for p in trainer.model.parameters())
    assert all(p.main_grad.abs().max() > 0 for p in draft.module.parameters())


def test_the_drafts_gradient_reaches_every_parameter_of_its_own_and_none_of_the_policy(tmp_path: Path) -> None:
    run_distributed(_check_isolation, 1, write_checkpoint(tmp_path / "model"))


def _check_no_targets(_rank: int, path: Path) -> None:
    trainer = _trainer(path)
    token_ids = torch.randint(0, VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(token_ids, dtype=torch.bool)
    loss, gradients, sums = _loss(trainer, _targets(token_ids, torch.ones_like(token_ids), nothing))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
    assert sums.abs().max() == 0


def test_a_batch_without_targets_gives_a_connected_zero(tmp_path: Path) -> None:
    run_distributed(_check_no_targets, 1, write_checkpoint(tmp_path / "model"))


def test_blocks_of_queries_do_not_change_chain_attention(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(11, 2, 4, 8, generator=generator)
    keys, values = ([torch.randn(11, 2, 2, 8, generator=generator) for _ in range(3)] for _ in range(2))

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        inputs = [x.clone().requires_grad_() for x in (query, *keys, *values)]
        out = chain_attention.chain_attention(inputs[0], inputs[1:4], inputs[4:], None, 8**-0.5)
        return out, torch.autograd.grad(out.square().sum(), inputs)

    whole, whole_gradients = run()
    monkeypatch.setattr(chain_attention, "QUERY_BLOCK", 4)
    blocks, block_gradients = run()
    assert (whole - blocks).abs().max() < TOLERANCE
    for a, b in zip(whole_gradients, block_gradients, strict=True):
        assert (a - b).abs().max() < 1e-4
