"""The exported policy and draft in a fresh engine: it proposes what the engines of the run did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from skyrl_spec.controller.placement import engine_settings
from skyrl_spec.doctor.finding import FAIL, OK, Finding
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.evaluation.measure import lone_engine
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.types import Proposals

CHECK = "export in vLLM"


@dataclass(frozen=True)
class Exported:
    """An export, and what an engine of the run proposed with the same weights."""

    folder: Path
    proposals: list[Proposals]
    sampling: SamplingConfig
    seed: int


def reloaded(config: Config, exported: Exported, limit: float) -> Finding:
    """Loads the export into an engine and compares. Needs Ray, and the memory of an engine."""
    with lone_engine(_settings(config, exported.folder)) as engine:
        prompts = [item.prompt_ids for item in exported.proposals]
        theirs = engine.propose_on_one(prompts, exported.sampling, exported.seed)
    return compare(exported.proposals, theirs, limit)


def compare(mine: list[Proposals], theirs: list[Proposals], limit: float) -> Finding:
    """The finding from two engines' proposals for the same prompts with the same seed."""
    policy, draft, tokens, blocks = [], [], 0, 0
    for one, other in zip(mine, theirs, strict=True):
        same = _same(one.generation.token_ids, other.generation.token_ids)
        tokens += len(one.generation.token_ids)
        policy += _differences(one.generation.logprobs[:same], other.generation.logprobs[:same])
        for block in zip(one.anchors, one.drafted, one.draft_logprobs, strict=True):
            blocks += 1
            if block[0] in other.anchors:
                index = other.anchors.index(block[0])
                if other.drafted[index] == block[1]:
                    draft.append(float(np.mean(_differences(block[2], other.draft_logprobs[index]))))
    seen = f"{len(policy) / max(tokens, 1):.0%} of the tokens are equal, mean |log-prob difference| {_mean(policy):.1e}"
    if blocks:
        seen += f"; {len(draft) / blocks:.0%} of the drafts are equal, {_mean(draft):.1e}"
    # Another order of sums may turn a token that two have nearly the same probability for. It seldom does.
    enough = len(policy) >= tokens / 2 and len(draft) >= blocks / 2
    if enough and all(_mean(values) <= limit for values in (policy, draft)):
        return Finding(CHECK, OK, seen)
    return Finding(CHECK, FAIL, f"{seen}; limit {limit:g}", "the exported weights or config.json are wrong")


def _settings(config: Config, folder: Path) -> EngineSettings:
    """Settings of the run's engines, with the exported model and draft."""
    trainer, kind = config.trainer, trained_kind(config.trainer)
    model = replace(trainer.policy.model, path=str(folder / "model"))
    trainer = replace(trainer, policy=replace(trainer.policy, model=model))
    if kind is not None:
        trainer = kind.with_path(trainer, str(folder / ("draft" if kind.has_own_directory else "model")))
    return engine_settings(replace(config, trainer=trainer))


def _same(mine: list[int], theirs: list[int]) -> int:
    """Number of tokens before the first different one."""
    pairs = zip(mine, theirs, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(mine), len(theirs)))


def _differences(mine: list[float], theirs: list[float]) -> list[float]:
    return np.abs(np.array(mine) - np.array(theirs)).tolist()


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
