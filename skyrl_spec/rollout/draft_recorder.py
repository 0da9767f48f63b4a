"""What vLLM's drafter proposes, read in the worker process where it is computed (vLLM's ``worker_extension_cls``)."""

from __future__ import annotations

from typing import Any

import torch


class DraftRecorder:
    """Mixed into vLLM's worker; its methods are called by name through ``LLM.collective_rpc``."""

    model_runner: Any

    def start_recording_drafts(self) -> None:
        """From now on keep each drafted token and its log-prob under the draft. A request runs alone meanwhile.

        A draft without a model (n-gram) has nothing to keep.
        """
        self._drafts: list[torch.Tensor] = []
        self._model = getattr(self.model_runner.drafter, "model", None)
        if self._model is None:
            return
        compute_logits = self._model.compute_logits

        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute_logits(*args, **kwargs)
            # Ranks whose logits were gathered by another have none.
            if logits is not None:
                self._drafts.append(torch.stack(logits.float().log_softmax(dim=-1).max(dim=-1)).double())
            return logits

        self._compute_logits, self._model.compute_logits = compute_logits, recorded

    def take_recorded_drafts(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probs since the last call, in the order they were drafted."""
        if not self._drafts:
            return [], []
        logprobs, tokens = torch.cat(self._drafts, dim=1).cpu()
        self._drafts.clear()
        return tokens.long().tolist(), logprobs.tolist()

    def stop_recording_drafts(self) -> None:
        if self._model is not None:
            self._model.compute_logits = self._compute_logits
