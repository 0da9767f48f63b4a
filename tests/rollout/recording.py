"""Engines that keep what their drafter computes, and the DFlash definition to hold that against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from dflash_reference import DflashReference, TargetReference
from torch import Tensor

from skyrl_spec.config import SamplingConfig
from skyrl_spec.rollout.engine import RolloutEngine


@dataclass
class DraftedBlock:
    """The position of a block's first token, and the drafter's logits ``[K, V]`` of the K tokens after it."""

    anchor: int
    logits: Tensor


@dataclass
class DraftedResponse:
    """A greedy response to a prompt, and the blocks that were drafted for it, in order."""

    token_ids: list[int]
    blocks: list[DraftedBlock]


@ray.remote
class DflashRecordingEngine(RolloutEngine):
    """An engine that keeps the logits of its DFlash drafter."""

    def draft(self, prompt: list[int], num_tokens: int) -> DraftedResponse:
        """A greedy response of ``num_tokens`` to ``prompt``, alone in its batch."""
        model = self._runner().drafter.model
        recorded: list[Tensor] = []
        original = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Tensor:
            logits = original(*args, **kwargs)
            recorded.append(logits.clone())
            return logits

        model.compute_logits = compute_logits
        try:
            sampling = SamplingConfig(max_generate_length=num_tokens, temperature=0.0)
            response = self.generate([prompt], sampling, n=1, seed=0)[0][0].token_ids
        finally:
            model.compute_logits = original
        token_ids = [*prompt, *response]
        return DraftedResponse(token_ids, _blocks(recorded, token_ids, len(prompt)))

    def _runner(self) -> Any:
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner


def _blocks(recorded: list[Tensor], token_ids: list[int], first_anchor: int) -> list[DraftedBlock]:
    """The first block starts at the first sampled token; each further one behind the accepted drafts."""
    blocks = []
    anchor = first_anchor
    for logits in recorded:
        if anchor >= len(token_ids):
            break
        blocks.append(DraftedBlock(anchor, logits))
        drafts = logits.argmax(-1).tolist()
        anchor += 1
        for draft in drafts:
            if anchor >= len(token_ids) or draft != token_ids[anchor]:
                break
            anchor += 1
    return blocks


def reference_logits(
    draft: DflashReference, target: TargetReference, token_ids: list[int], block: DraftedBlock
) -> Tensor:
    """``[K, V]``: of ``block`` by the definition."""
    aux_hidden = target.aux_hidden(token_ids[: block.anchor], draft.target_layer_ids)
    embeds = target.block_embeddings(token_ids[block.anchor], draft.mask_token, num_masks=len(block.logits))
    return draft.logits(aux_hidden, embeds, block.anchor, target.output_weight_VD).detach()
