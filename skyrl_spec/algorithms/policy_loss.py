"""The policy objectives by ``trainer.algorithm.policy_loss_type``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skyrl_spec.algorithms.cispo import cispo
from skyrl_spec.algorithms.clipped_surrogate import clipped_surrogate
from skyrl_spec.algorithms.gspo import gspo
from skyrl_spec.algorithms.token_loss import PolicyTokenLoss
from skyrl_spec.settings.algorithm import AlgorithmConfig


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a micro-batch: N tokens of R responses, those of a response one after the other."""

    policy_logprobs_N: Tensor
    old_logprobs_N: Tensor
    advantages_N: Tensor
    # Index of each token's response, and the number of tokens of each response.
    response_N: Tensor
    lengths_R: Tensor

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs under the policy and before the update, and advantages."""
        return self.policy_logprobs_N, self.old_logprobs_N, self.advantages_N


def _clips(algorithm: AlgorithmConfig) -> dict[str, Any]:
    return {"eps_clip_low": algorithm.eps_clip_low, "eps_clip_high": algorithm.eps_clip_high}


POLICY_LOSSES: dict[str, Callable[[ResponseTokens, AlgorithmConfig], PolicyTokenLoss]] = {
    "regular": lambda tokens, algorithm: clipped_surrogate(
        *tokens.values, **_clips(algorithm), clip_ratio_c=algorithm.clip_ratio_c
    ),
    "gspo": lambda tokens, algorithm: gspo(*tokens.values, tokens.response_N, tokens.lengths_R, **_clips(algorithm)),
    "cispo": lambda tokens, algorithm: cispo(*tokens.values, **_clips(algorithm)),
}
