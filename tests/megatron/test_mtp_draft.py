"""Megatron MTP draft against the head in plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mtp_reference import MtpHead
from safetensors.torch import load_file
from spawn import run_distributed
from tiny_checkpoints import make_config, make_pack, random_documents, tiny_config, write_checkpoint

from skyrl_spec.drafts.mtp import EMBEDDING, TRUNK_HIDDEN, _chains
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import capture
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

TOLERANCE = 1e-5
NUM_DEPTHS = 3


def _trainer(path: Path) -> PolicyTrainer:
    ranks = parallel.lay_out(1, torch.device("cpu"))
    return PolicyTrainer(make_config(path), load_spec(str(path)), ranks, total_optimizer_steps=1)


def _check_reference(_rank: int, path: Path) -> None:
    trainer = _trainer(path)
    assert trainer.draft is not None
    draft = trainer.draft.draft
    head = MtpHead(tiny_config("MiMoForCausalLM", tied=False))
    prefix = "model.mtp_layers.0."
    weights = load_file(path / "model.safetensors")
    head.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
    documents = random_documents(2, 7, 1, 19)
    pack = make_pack(*documents)
    with torch.no_grad(), capture(trainer.model, draft.capture_points) as captured:
        with captured.listening():
            trainer.model(pack)
        trunk = captured.take()
        starts = np.asarray(pack.documents.starts)
        chains = _chains(pack, starts[:-1], starts[:-1], starts[1:], NUM_DEPTHS)
        outputs = draft.forward(trunk[TRUNK_HIDDEN], trunk[EMBEDDING], pack, chains)
        for tokens in pack.documents.slices():
            expected = head(trunk[TRUNK_HIDDEN][None, tokens], trunk[EMBEDDING][None, tokens], NUM_DEPTHS)
            for depth, (mine, theirs) in enumerate(zip(outputs, expected, strict=True), start=1):
                # The last bases have no token t+d.
                last = max(tokens.stop - tokens.start - depth, 0)
                difference = (mine[tokens] - theirs[0])[:last].abs()
                assert difference.numel() == 0 or difference.max() < TOLERANCE, (tokens, depth)


def test_every_depth_equals_the_plain_head(tmp_path: Path) -> None:
    run_distributed(_check_reference, 1, write_checkpoint(tmp_path / "model"))
