"""Sampling and training in turns: a batch is sampled with the newest weights, then trained on."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from skyrl_spec.algorithms.filters import Collected, collect_groups
from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.measures import timed
from skyrl_spec.controller.rollouts import RolloutSampler, SpeculationMeter, reward_metrics
from skyrl_spec.controller.source import FilterReport, Sampled
from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.metrics import names
from skyrl_spec.settings.derived import max_staleness
from skyrl_spec.settings.schema import Config
from skyrl_spec.types import Versions


class InTurns:
    """Samples a batch when it is asked for. A ``source.Source``."""

    def __init__(self, config: Config, sampler: RolloutSampler, engines: EngineGroup, stream: PromptStream):
        self._config, self._sampler, self._engines, self._stream = config, sampler, engines, stream
        self._filter_report = FilterReport(config)

    @property
    def is_over(self) -> bool:
        return self._stream.epoch >= self._config.trainer.epochs

    def start(self, versions: Versions, num_steps: int) -> None:
        pass

    def take(self, versions: Versions) -> Sampled:
        return self.sample()

    def beside(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def held(self, *, keeps_keys: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def is_sampling(self) -> bool:
        return False

    def draft_metrics(self) -> dict[str, float]:
        return {}

    def trained(self, versions: Versions) -> None:
        pass

    def step_metrics(self, sampled: Sampled, timings: dict[str, float]) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict(), "num_train_calls": self._sampler.num_train_calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.num_train_calls = state["num_train_calls"]
        running = state.get("running", {"groups": [], "queue": []})
        if num_groups := len(running["groups"]) + len(running["queue"]):
            setting = f"trainer.fully_async.max_staleness_steps={max_staleness(self._config)}"
            print(
                f"skyrl-spec: {setting}: the checkpoint has {num_groups} prompts that were begun and not trained on; "
                "they are left out (2 or more takes them)",
                file=sys.stderr,
            )

    def close(self) -> None:
        self._sampler.close()

    def sample(self) -> Sampled:
        """The next batch, sampled with the weights that the engines have."""
        start = time.perf_counter()
        timings: dict[str, float] = {}
        speculation = SpeculationMeter(self._engines, "train")
        with timed(timings, "generate"):
            collected, throughput = self._collect()
        generator = self._config.generator
        values = reward_metrics(collected.sampled, generator.n_samples_per_prompt, generator.max_turns)
        values |= speculation.metrics() | {names.THROUGHPUT: throughput}
        values |= self._filter_report.metrics(collected)
        return Sampled(collected.groups, values, timings, time.perf_counter() - start)

    def _collect(self) -> tuple[Collected, float]:
        """Groups of one train batch, and the tokens per second of their generation."""
        trainer, sampler = self._config.trainer, self._sampler
        tokens_before, seconds_before = sampler.num_tokens, sampler.generate_s
        collected = collect_groups(
            lambda: sampler.sample_for_training(self._stream.next_batch()),
            trainer.train_batch_size,
            trainer.algorithm.dynamic_sampling,
        )
        return collected, (sampler.num_tokens - tokens_before) / (sampler.generate_s - seconds_before)
