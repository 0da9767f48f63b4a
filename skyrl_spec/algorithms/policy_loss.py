"""The policy objectives by ``trainer.algorithm.policy_loss_type``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def _regular(tokens: ResponseTokens, algorithm: AlgorithmConfig) -> PolicyTokenLoss:
    return clipped_surrogate(
        tokens.policy_logprobs_N,
        tokens.old_logprobs_N,
        tokens.advantages_N,
        eps_clip_low=algorithm.eps_clip_low,
        eps_clip_high=algorithm.eps_clip_high,
        clip_ratio_c=algorithm.clip_ratio_c,
    )


def _gspo(tokens: ResponseTokens, algorithm: AlgorithmConfig) -> PolicyTokenLoss:
    return gspo(
        tokens.policy_logprobs_N,
        tokens.old_logprobs_N,
        tokens.advantages_N,
        tokens.response_N,
        tokens.lengths_R,
        eps_clip_low=algorithm.eps_clip_low,
        eps_clip_high=algorithm.eps_clip_high,
    )


def _cispo(tokens: ResponseTokens, algorithm: AlgorithmConfig) -> PolicyTokenLoss:
    return cispo(
        tokens.policy_logprobs_N,
        tokens.old_logprobs_N,
        tokens.advantages_N,
        eps_clip_low=algorithm.eps_clip_low,
        eps_clip_high=algorithm.eps_clip_high,
    )


POLICY_LOSSES: dict[str, Callable[[ResponseTokens, AlgorithmConfig], PolicyTokenLoss]] = {
    "regular": _regular,
    "gspo": _gspo,
    "cispo": _cispo,
}
