"""The policy's log-probs in plain transformers, on a CPU in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.utils import logging

from skyrl_spec.specs.model import ModelSpec, tensor_shapes
from skyrl_spec.types import Proposals

# A model with more parameters takes too long, and too much memory, on a CPU.
MAX_PARAMETERS = 3 * 10**9


def is_small(spec: ModelSpec) -> bool:
    """Whether ``reference_logprobs`` can run the model."""
    return sum(int(np.prod(shape)) for shape in tensor_shapes(spec).values()) <= MAX_PARAMETERS


@torch.no_grad()
def reference_logprobs(
    directory: Path, architecture: str, proposals: Sequence[Proposals], temperature: float
) -> np.ndarray:
    """Log-probs of the sampled tokens of all ``proposals``, ``[T]`` float32, as ``ProposalScores.policy_logprobs``."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # MiMo's trunk is Qwen2's. transformers has no class for it.
    model_class = Qwen2ForCausalLM if architecture == "MiMoForCausalLM" else AutoModelForCausalLM
    model = model_class.from_pretrained(directory, dtype=torch.float32)
    found = []
    for item in proposals:
        response = item.generation.token_ids
        token_ids = torch.tensor([[*item.prompt_ids, *response]])
        logits = model(token_ids).logits[0, len(item.prompt_ids) - 1 : -1].float()
        logprobs = (logits / temperature).log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found).numpy()
