"""Records the drafter's proposals inside vLLM's worker process (vLLM's ``worker_extension_cls``)."""

from __future__ import annotations

from typing import Any

import torch


class DraftRecorder:
    """Base class that vLLM adds to its worker. ``LLM.collective_rpc`` calls the methods by name."""

    model_runner: Any

    def start_recording_drafts(self) -> None:
        """Starts to record drafted tokens and their log-probs under the draft. Requests must run one at a time.

        Drafts are greedy meanwhile: a sampled one says nothing more about the draft's weights. A draft without a model
        (n-gram) has no logits, and nothing is recorded.
        """
        self._drafts: list[torch.Tensor] = []
        self._model = getattr(self.model_runner.drafter, "model", None)
        if self._model is None:
            return
        self._samples = self.model_runner.drafter._enable_probabilistic_draft_probs
        self.model_runner.drafter._enable_probabilistic_draft_probs = False
        compute_logits = self._model.compute_logits

        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute_logits(*args, **kwargs)
            # None on tensor-parallel ranks other than the one that gathers the logits.
            if logits is not None:
                self._drafts.append(torch.stack(logits.float().log_softmax(dim=-1).max(dim=-1)).double())
            return logits

        self._compute_logits, self._model.compute_logits = compute_logits, recorded

    def take_recorded_drafts(self) -> tuple[list[int], list[float]]:
        """Drafted tokens and their log-probs since the last call, in order."""
        if not self._drafts:
            return [], []
        logprobs, tokens = torch.cat(self._drafts, dim=1).cpu()
        self._drafts.clear()
        return tokens.long().tolist(), logprobs.tolist()

    def stop_recording_drafts(self) -> None:
        """Ends the recording; the drafter is as it was before."""
        if self._model is not None:
            self._model.compute_logits = self._compute_logits
            self.model_runner.drafter._enable_probabilistic_draft_probs = self._samples
