"""Megatron MTP draft against the head in plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from mtp_reference import MtpHead
from safetensors.torch import load_file
from spawn import run_distributed
from tiny_checkpoints import VOCAB_SIZE, make_config, tiny_config, write_checkpoint

from skyrl_spec.drafts import chain_attention
from skyrl_spec.drafts.base import BatchTokens
from skyrl_spec.drafts.mtp import EMBEDDING, TRUNK_HIDDEN
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.models.policy import document_mask
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

TOLERANCE = 1e-5
NUM_DEPTHS = 3


def _trainer(path: Path) -> PolicyTrainer:
    ranks = parallel.lay_out(1, torch.device("cpu"))
    return PolicyTrainer(make_config(path), load_spec(str(path)), ranks, total_optimizer_steps=1)


def _targets(token_ids_BS: torch.Tensor, segment_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor) -> BatchTokens:
    return BatchTokens(token_ids_BS, segment_ids_BS, loss_mask_BS, document_mask(segment_ids_BS))


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
            with captured.listening():
                trainer.model(token_ids)
            trunk = captured.take()
            outputs = draft.forward(trunk[TRUNK_HIDDEN], trunk[EMBEDDING], _targets(token_ids, ones, ones.bool()))
            expected = head(trunk[TRUNK_HIDDEN].transpose(0, 1), trunk[EMBEDDING].transpose(0, 1), NUM_DEPTHS)
        for depth, (mine, theirs) in enumerate(zip(outputs, expected, strict=True), start=1):
            # The last bases have no token t+d.
            difference = (mine.transpose(0, 1) - theirs)[:, : max(seq_len - depth, 0)].abs()
            assert difference.numel() == 0 or difference.max() < TOLERANCE, depth


def test_every_depth_equals_the_plain_head(tmp_path: Path) -> None:
    run_distributed(_check_reference, 1, write_checkpoint(tmp_path / "model"))


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
