"""Engines that record their drafter's logits, and their difference from the DFlash definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dflash_reference import DflashReference, TargetReference
from torch import Tensor

from skyrl_spec.rollout.actor import EngineActor
from skyrl_spec.settings.schema import SamplingConfig


@dataclass
class DraftedBlock:
    """The position of a block's first token in vLLM, and the drafter's logits ``[K, V]`` of the next K."""

    anchor: int
    logits: Tensor


@dataclass
class DraftedResponse:
    """A prompt with a greedy response, and the blocks that were drafted for it, in order."""

    token_ids: list[int]
    blocks: list[DraftedBlock]


class DflashRecorder(EngineActor):
    """An engine that records the logits of its DFlash drafter."""

    def draft(self, prompt: list[int], num_tokens: int) -> DraftedResponse:
        """A greedy response of ``num_tokens`` to ``prompt``, alone in its batch."""
        drafter = self._runner().drafter
        model, original = drafter.model, drafter.model.compute_logits
        blocks: list[DraftedBlock] = []

        def compute_logits(*args: Any, **kwargs: Any) -> Tensor:
            logits = original(*args, **kwargs)
            blocks.append(DraftedBlock(int(drafter.positions[0]), logits.clone()))
            return logits

        model.compute_logits = compute_logits
        try:
            sampling = SamplingConfig(max_generate_length=num_tokens, temperature=0.0)
            response = self.generate([prompt], sampling, n=1, seed=0)[0][0].token_ids
        finally:
            model.compute_logits = original
        token_ids = [*prompt, *response]
        # vLLM also drafts after each chunk of a prompt and after the response's end, and drops these drafts.
        kept = [block for block in blocks if len(prompt) <= block.anchor < len(token_ids)]
        return DraftedResponse(token_ids, kept)

    def shares_embeddings_and_head(self) -> bool:
        """Whether the drafter's embeddings and output head are the target's own modules."""
        target, draft = self._runner().model, self._runner().drafter.model
        return draft.model.embed_tokens is target.model.embed_tokens and draft.lm_head is target.lm_head

    def num_cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache so far."""
        (hits,) = [metric for metric in self._llm.get_metrics() if metric.name == "vllm:prefix_cache_hits"]
        return hits.value

    def context_buffers(self) -> dict[str, tuple[str, int]]:
        """Device and address of the drafter's tensors that are neither torch parameters nor torch buffers."""
        attributes = vars(self._runner().drafter.model.model)
        return {
            name: (str(value.device), value.data_ptr())
            for name, value in attributes.items()
            if isinstance(value, Tensor)
        }

    def _runner(self) -> Any:
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner


def largest_difference(responses: list[DraftedResponse], target: TargetReference, draft: DflashReference) -> float:
    """Largest |difference| of recorded logits from the definition's, over all blocks."""
    return max(
        float((block.logits - _reference_logits(draft, target, response.token_ids, block)).abs().max())
        for response in responses
        for block in response.blocks
    )


def _reference_logits(
    draft: DflashReference, target: TargetReference, token_ids: list[int], block: DraftedBlock
) -> Tensor:
    """``[K, V]``: logits of ``block`` by the definition."""
    aux_hidden = target.aux_hidden(token_ids[: block.anchor], draft.target_layer_ids)
    embeds = target.block_embeddings(token_ids[block.anchor], draft.mask_token, num_masks=len(block.logits))
    return draft.logits(aux_hidden, embeds, block.anchor, target.output_weight_VD).detach()
