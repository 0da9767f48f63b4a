"""Rollout speed with and without a draft, measured alternately on two engines with the same settings and prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from statistics import median
from typing import Any

import ray

from skyrl_spec.controller.actor_errors import cause_of_death
from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.errors import RunError
from skyrl_spec.evaluation.prompts import by_category
from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Prompt, SpecCounters

# Seconds that an engine may take to start, and to answer.
_START_S, _ANSWER_S = 600.0, 3600.0


@dataclass
class Measurement:
    """Measurements of one number of draft tokens at one batch size, in tokens/s with one entry per round."""

    num_tokens: int
    batch_size: int
    plain_tok_s: list[float] = field(default_factory=list)
    drafted_tok_s: list[float] = field(default_factory=list)
    counters: SpecCounters = field(default_factory=SpecCounters)
    # Of the largest batch size, where prompts have categories.
    by_category: dict[str, SpecCounters] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Speed-up by the draft in each round."""
        return [drafted / plain for drafted, plain in zip(self.drafted_tok_s, self.plain_tok_s, strict=True)]

    @property
    def speedup(self) -> float:
        return median(self.ratios)

    @property
    def acceptance_by_position(self) -> list[float]:
        return by_position(self.counters)


def by_position(counters: SpecCounters) -> list[float]:
    """Share of drafts accepted at least up to each position."""
    return [accepted / max(1, counters.num_drafts) for accepted in counters.num_accepted_tokens_per_pos]


def measure(
    settings: EngineSettings,
    drafts: dict[int, dict[str, Any]],
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    batch_sizes: Sequence[int],
    *,
    rounds: int,
    min_rollouts: int,
    seed: int = 0,
    on_measured: Callable[[list[Measurement]], None] = lambda _: None,
) -> list[Measurement]:
    """Measurements of all combinations of ``drafts`` and ``batch_sizes``, and acceptance by category.

    One engine without a draft stays up; engines with a draft are started one after the other. Only one engine generates
    at a time. The engine that goes first changes every round, and an additional first round warms up.

    Args:
        drafts: vLLM's ``speculative_config`` by number of draft tokens.
        on_measured: called with the measurements of each draft when they are complete.
    """
    results = []
    with lone_engine(replace(settings, speculative_config=None)) as plain:
        for num_tokens, draft in drafts.items():
            with lone_engine(replace(settings, speculative_config=draft)) as drafted:
                measured = [Measurement(num_tokens, size) for size in batch_sizes]
                stream = cycle(prompts)
                for number in range(-1, rounds):
                    for result in measured:
                        # Round up to whole batches.
                        num_batches = -(-min_rollouts // result.batch_size)
                        batch = list(islice(stream, num_batches * result.batch_size))
                        _measure_once(result, plain, drafted, batch, sampling, number, seed)
                largest = max(measured, key=lambda result: result.batch_size)
                for category, chosen in by_category(prompts).items():
                    largest.by_category[category] = _acceptance(drafted, chosen, largest.batch_size, sampling, seed)
            on_measured(measured)
            results += measured
    return results


def _measure_once(
    result: Measurement,
    plain: EngineGroup,
    drafted: EngineGroup,
    prompts: list[Prompt],
    sampling: SamplingConfig,
    number: int,
    seed: int,
) -> None:
    before, round_seed = drafted.spec_counters(), seed * 1_000_003 + number + 1
    order = [plain, drafted] if number % 2 == 0 else [drafted, plain]
    speed = {
        id(engine): _tokens_per_second(engine, prompts, result.batch_size, sampling, round_seed) for engine in order
    }
    if number >= 0:
        result.plain_tok_s.append(speed[id(plain)])
        result.drafted_tok_s.append(speed[id(drafted)])
        result.counters += drafted.spec_counters() - before


def _acceptance(
    drafted: EngineGroup, prompts: list[Prompt], batch_size: int, sampling: SamplingConfig, seed: int
) -> SpecCounters:
    """Counters of one response to each prompt."""
    before = drafted.spec_counters()
    _tokens_per_second(drafted, prompts, batch_size, sampling, seed)
    return drafted.spec_counters() - before


def _tokens_per_second(
    engine: EngineGroup, prompts: list[Prompt], batch_size: int, sampling: SamplingConfig, seed: int
) -> float:
    """Tokens/s over consecutive calls with ``batch_size`` prompts each."""
    num_tokens, start = 0, time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        groups = engine.generate(prompts[first : first + batch_size], sampling, 1, seed)
        num_tokens += sum(len(generation.token_ids) for group in groups for generation in group)
    return num_tokens / (time.perf_counter() - start)


@contextmanager
def lone_engine(settings: EngineSettings) -> Iterator[EngineGroup]:
    """An engine that lives as long as the context.

    Raises:
        RunError: the engine does not start.
    """
    options = actor_options(settings)
    if options["num_gpus"] == 1:
        # The two engines share a GPU.
        options["num_gpus"] = 0.5
    actor_class: Any = RolloutActor
    handle = actor_class.options(**options).remote(settings)
    try:
        ray.get(handle.ping.remote(), timeout=_START_S)
    except ray.exceptions.GetTimeoutError:
        raise RunError(
            f"an engine did not start within {_START_S:.0f} s (GPUs in the cluster: "
            f"{ray.cluster_resources().get('GPU', 0):g}); free GPUs, or lower tensor_parallel_size"
        ) from None
    except ray.exceptions.RayError as error:
        draft = settings.speculative_config or "no draft"
        cause = getattr(error, "cause", None)
        reason = " ".join(str(cause or cause_of_death(error)).split())[:300]
        raise RunError(f"vLLM cannot load {settings.model_path} with {draft}: {reason}") from None
    group = EngineGroup([handle], _ANSWER_S)
    try:
        yield group
    finally:
        group.shutdown()
