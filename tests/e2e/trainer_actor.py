"""A trainer as an actor, called like a worker, which also returns the outputs of its draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch
from tiny_checkpoints import make_batch, make_pack

from skyrl_spec.models.pack import Pack
from skyrl_spec.settings.schema import Config


@ray.remote
class TrainerActor:
    """A ``PolicyTrainer`` of one rank."""

    def __init__(self, config: Config, store: Path):
        from skyrl_spec.models import parallel
        from skyrl_spec.specs.model import load_spec
        from skyrl_spec.training.trainer import PolicyTrainer

        torch.set_num_threads(1)
        ranks = parallel.initialize(
            rank=0,
            world_size=1,
            tensor_parallel_size=1,
            device=torch.device("cpu"),
            store=torch.distributed.FileStore(str(store), 1),
            timeout_s=120.0,
        )
        spec = load_spec(config.trainer.policy.model.path)
        self._trainer = PolicyTrainer(config, spec, ranks, total_optimizer_steps=10)

    def chain_logits(self, token_ids: list[int], base: int) -> torch.Tensor:
        """``[K, V]``: every depth of an MTP head at ``base``, as the training step computes it."""
        # Depth d reads token base+d only: the token after them is padding.
        return self.drafted_logits([*token_ids, 0], [base + 1])[0]

    def drafted_logits(self, token_ids: list[int], anchors: list[int]) -> torch.Tensor:
        """``[A, K, V]``: what the draft drafts after ``anchors``, as the training step computes it."""
        from skyrl_spec.drafts.base import Teacher

        trainer, pack = self._trainer, make_pack(token_ids)
        trunk, hidden_TD = self._forward(pack)
        with torch.no_grad():
            teacher = Teacher(hidden_TD, trainer.model.output_weight_vD(), trainer.model.embed)
            return self._logits(trainer.draft.draft.propose(trunk, teacher, pack, anchors))

    def logprob(self, token_ids: list[int]) -> float:
        """Log-prob of the last token."""
        _, hidden_TD = self._forward(make_pack(token_ids))
        return float(self._logits(hidden_TD[-2]).log_softmax(-1)[token_ids[-1]])

    def train(self, seed: int) -> None:
        self._trainer.train_mini_batch(make_batch(seed))

    def export(self, which: Any) -> list[tuple[ray.ObjectRef, int]]:
        from skyrl_spec.sync.payload import pack_chunks, payload_bytes

        return [(ray.put(chunk), payload_bytes(chunk)) for chunk in pack_chunks(self._trainer.export(which), 100_000)]

    def save_hf(self, run_dir: Path) -> None:
        from skyrl_spec.checkpoint.hf_export import save_hf

        save_hf(self._trainer, run_dir)

    def _forward(self, pack: Pack) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
        """Hidden states that the draft captures, and the trunk's output."""
        from skyrl_spec.models.capture import capture

        draft = self._trainer.draft.draft
        with torch.no_grad(), capture(self._trainer.model, draft.capture_points) as captured:
            with captured.listening():
                hidden_TD = self._trainer.model(pack)
            return captured.take(), hidden_TD

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return (hidden @ self._trainer.model.output_weight_vD().t())[..., : self._trainer.spec.vocab_size]
