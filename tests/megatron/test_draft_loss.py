"""Draft losses and gradients against the definition, written out token by token in float64.

The reference runs transformers' model and the plain drafts on one row after the other, without padding. A real
PolicyTrainer gets the same rows as a batch, in several micro-batches. The trunk tensors that drafts read are compared
too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dflash_reference import DflashReference, TargetReference
from gradients import hf_gradients
from mtp_reference import MtpHead
from safetensors.torch import load_file
from spawn import run_distributed
from tiny_checkpoints import dflash_path, make_batch, make_config, make_pack, tiny_config, write_model
from torch import Tensor
from transformers import Qwen2ForCausalLM

from skyrl_spec.drafts.mtp import EMBEDDING, TRUNK_HIDDEN
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.models.capture import CapturePoint, capture
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

# fp32 against float64; of gradients: norm of the difference over norm of the gradient.
TOLERANCE = 1e-5
TEMPERATURE = 0.7
MIXTURE = "0.7*soft_ce + 0.3*accept"
NUM_DRAFTED, GAMMA = 3, 2.0
PREFIX = "model.mtp_layers.0."


@dataclass(frozen=True)
class Drafted:
    """A drafted token: the draft's logits, the policy's at the same place, the sampled token, what it counts."""

    draft_V: Tensor
    policy_V: Tensor
    sampled: int
    weight: float
    # The token before it in its chain.
    before: Drafted | None

    def loss(self, loss_type: str) -> Tensor:
        if loss_type == MIXTURE:
            return 0.7 * self.loss("soft_ce") + 0.3 * self.loss("accept")
        if loss_type == "accept":
            return 1 - self.accepted()
        logprobs_V = (self.draft_V / TEMPERATURE).log_softmax(-1)
        if loss_type == "hard_ce":
            return -logprobs_V[self.sampled]
        if loss_type == "tv":
            return 1 - self.overlap()
        return -((self.policy_V / TEMPERATURE).softmax(-1) * logprobs_V).sum()

    def overlap(self) -> Tensor:
        policy_V, draft_V = ((logits_V / TEMPERATURE).softmax(-1) for logits_V in (self.policy_V, self.draft_V))
        return torch.minimum(policy_V, draft_V).sum()

    def accepted(self) -> Tensor:
        """Probability that a sampled token and all before it are accepted."""
        return self.overlap() * (1 if self.before is None else self.before.accepted())


def rows_of_batch() -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens and loss mask of each row."""
    batch = make_batch(seed=0)
    for token_ids, length, mask in zip(batch.token_ids, batch.lengths, batch.loss_mask, strict=True):
        yield token_ids[:length].tolist(), mask[:length].tolist()


class MtpReference:
    """MiMo's trunk in transformers, and its MTP head in plain PyTorch."""

    def __init__(self, path: Path):
        self.model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa")
        self.head = MtpHead(tiny_config("MiMoForCausalLM", tied=False)).double()
        weights = load_file(path / "model.safetensors")
        own = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
        self.head.load_state_dict(own)

    @torch.no_grad()
    def trunk(self, token_ids: list[int]) -> dict[CapturePoint, Tensor]:
        """The trunk's output before its final norm, and the embeddings, ``[S, D]``."""
        found: list[Tensor] = []
        handle = self.model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
        self.model(torch.tensor([token_ids]))
        handle.remove()
        return {TRUNK_HIDDEN: found[0], EMBEDDING: self.model.model.embed_tokens.weight[token_ids]}

    def drafted(self, token_ids: list[int], mask: list[bool]) -> Iterator[Drafted]:
        trunk = self.trunk(token_ids)
        with torch.no_grad():
            policy_SV = self.model(torch.tensor([token_ids])).logits[0]
        outputs = self.head(trunk[TRUNK_HIDDEN][None], trunk[EMBEDDING][None], NUM_DRAFTED)
        weight_VD = self.model.lm_head.weight.detach()
        for base in range(len(token_ids)):
            before = None
            for depth, out_BSD in enumerate(outputs, start=1):
                drafted = base + depth + 1
                # An engine begins behind a sampled token, and comes to a draft over tokens that were sampled too.
                if drafted < len(token_ids) and all(mask[base + 1 : drafted + 1]):
                    logits_V = out_BSD[0, base] @ weight_VD.t()
                    before = Drafted(logits_V, policy_SV[drafted - 1], token_ids[drafted], 1.0, before)
                    yield before

    def gradients(self) -> dict[str, Tensor]:
        return {PREFIX + name: parameter.grad for name, parameter in self.head.named_parameters()}


class BlockReference:
    """A Qwen3 target in transformers, and the DFlash draft's definition."""

    def __init__(self, path: Path):
        self.target = TargetReference(path, torch.float64)
        self.draft = DflashReference(dflash_path(path), torch.float64)

    def trunk(self, token_ids: list[int]) -> dict[CapturePoint, Tensor]:
        """Outputs of the draft's target layers, ``[S, D]``."""
        layers = self.draft.target_layer_ids
        aux_SnD = self.target.aux_hidden(token_ids, layers)
        return {CapturePoint(f"decoder.layers.{layer}", "output"): aux_SnD[:, i] for i, layer in enumerate(layers)}

    def drafted(self, token_ids: list[int], mask: list[bool]) -> Iterator[Drafted]:
        aux_SnD = torch.stack(list(self.trunk(token_ids).values()), dim=1)
        with torch.no_grad():
            policy_SV = self.target._model(torch.tensor([token_ids])).logits[0]
        for anchor in range(len(token_ids) - 1):
            if not all(mask[anchor : anchor + 2]):
                continue
            block_BD = self.target.block_embeddings(token_ids[anchor], self.draft.mask_token, NUM_DRAFTED)
            logits_KV = self.draft.logits(aux_SnD, block_BD, anchor, self.target.output_weight_VD)
            before = None
            for slot in range(1, NUM_DRAFTED + 1):
                drafted = anchor + slot
                if drafted < len(token_ids) and all(mask[anchor : drafted + 1]):
                    weight = float(np.exp(-(slot - 1) / GAMMA))
                    before = Drafted(logits_KV[slot - 1], policy_SV[drafted - 1], token_ids[drafted], weight, before)
                    yield before

    def gradients(self) -> dict[str, Tensor]:
        return {name: tensor.grad for name, tensor in self.draft.weights.items()}


REFERENCES: dict[str, Callable[[Path], Any]] = {"mtp": MtpReference, "dflash": BlockReference}


def run_config(path: Path, draft: str, loss_type: str) -> Config:
    config = make_config(path, draft=draft)
    trainer = config.trainer
    config.generator.sampling_params.temperature = TEMPERATURE
    trainer.mtp.num_speculative_tokens = trainer.dflash.num_speculative_tokens = NUM_DRAFTED
    trainer.mtp.loss_type = trainer.dflash.loss_type = loss_type
    trainer.dflash.loss_decay_gamma = GAMMA
    return config


def _train(_rank: int, path: Path, draft: str, loss_type: str, out: Path) -> None:
    """Write loss, gradients, and what the draft reads of the trunk in each row."""
    ranks = parallel.lay_out(1, torch.device("cpu"))
    trainer = PolicyTrainer(run_config(path, draft, loss_type), load_spec(str(path)), ranks, total_optimizer_steps=1)
    assert trainer.draft is not None
    metrics = values(trainer._reduce(trainer.forward_backward(make_batch(seed=0))))
    gradients = hf_gradients(trainer, "draft")
    captured_rows = []
    with capture(trainer.model, trainer.draft.draft.capture_points) as captured:
        for token_ids, _ in rows_of_batch():
            with torch.no_grad(), captured.listening():
                trainer.model(make_pack(token_ids))
            tensors = captured.take()
            captured_rows.append([tensors[point] for point in trainer.draft.draft.capture_points])
    torch.save({"metrics": metrics, "gradients": gradients, "captured": captured_rows}, out)


@pytest.mark.parametrize("loss_type", ["soft_ce", "hard_ce", "tv", "accept", MIXTURE])
@pytest.mark.parametrize("draft", REFERENCES)
def test_loss_and_gradients_equal_the_definition(tmp_path: Path, draft: str, loss_type: str) -> None:
    path, out = write_model(tmp_path / "model", draft), tmp_path / "out.pt"
    run_distributed(_train, 1, path, draft, loss_type, out)
    mine = torch.load(out, weights_only=True)

    reference = REFERENCES[draft](path)
    for (token_ids, _), tensors in zip(rows_of_batch(), mine["captured"], strict=True):
        for (point, expected), tensor in zip(reference.trunk(token_ids).items(), tensors, strict=True):
            assert relative_error(tensor, expected) < TOLERANCE, point
    drafted = [item for row in rows_of_batch() for item in reference.drafted(*row)]
    assert len(drafted) > 50
    total_weight = sum(item.weight for item in drafted)
    loss = torch.stack([item.weight * item.loss(loss_type) for item in drafted]).sum() / total_weight
    loss.backward()
    agreements = [bool(item.draft_V.argmax() == item.policy_V.argmax()) for item in drafted]
    assert mine["metrics"]["draft/loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    assert mine["metrics"]["draft/top1_agreement"] == pytest.approx(np.mean(agreements), rel=1e-12)
    expected = reference.gradients()
    assert mine["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(mine["gradients"][name], gradient) < TOLERANCE, name


def relative_error(tensor: Tensor, expected: Tensor) -> float:
    return float((tensor.double() - expected).norm() / expected.norm())
