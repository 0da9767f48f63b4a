"""vLLM's schedulers with a number of drafted tokens that follows the batch (``scheduler_cls``).

vLLM looks the length of the next draft up in ``dynamic_sd_lookup``, by batch size, in every step. Here the lookup is a
``Speculation``, which also hears how long each step took and what it accepted. It lives in the process of vLLM's engine
core. ``EngineCore.call_speculation`` (``vllm_patches``) brings the calls of ``RolloutEngine`` there.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from skyrl_spec.rollout.lengths import AutoLengths, Lengths, LengthTable, StepLog
from skyrl_spec.rollout.step_times import (
    OFF,
    Calibration,
    EngineStep,
    StepTimes,
    between,
    lengths_to_measure,
    lengths_to_try,
)

# Key of vLLM's additional_config: the length for batch size 1, 2, ..., or None to choose it.
TABLE = "skyrl_spec_lengths"
PATHS = {"cpu": f"{__name__}.SpeculationScheduler", "cuda": f"{__name__}.AsyncSpeculationScheduler"}


class Speculation:
    """Decides the length of drafts in an engine, and measures its steps. The public methods are calls of an engine.

    Args:
        table: length for batch size 1, 2, ... None: lengths are chosen, once step times are known. Until then all
            drafts are as long as possible.
        largest: most requests that the engine runs at the same time.
        most: most tokens that the draft drafts.
        has_model: whether the draft has a model, whose keys it may lack.
    """

    def __init__(self, table: list[int] | None, largest: int, most: int, *, has_model: bool):
        self._largest, self._most = largest, most
        self._to_try = lengths_to_try(most, has_model=has_model)
        self._lengths: Lengths = LengthTable(table or [most] * largest)
        self._pinned: int | None = None
        self._calibration: Calibration | None = None
        self._log = StepLog(largest, most)
        # Drafts that had at least 1, 2, ... tokens since the start. vLLM has no such counter.
        self._drafted_per_pos = np.zeros(most, np.int64)
        # Length of the last step, and when it ended; None after a pause.
        self._last_drafted = OFF
        self._last_end: float | None = None
        self._is_idle = True

    def pin_length(self, length: int | None) -> None:
        """Drafts ``length`` tokens in every step from now on; None ends this."""
        self._pinned = length

    def start_calibration(self, batch_size: int) -> None:
        """Tries lengths in turns while the engine has ``batch_size`` requests."""
        self._calibration = Calibration(batch_size, lengths_to_measure(self._to_try))

    def calibrated_seconds(self) -> list[float] | None:
        """Seconds of a step for each of ``lengths_to_measure``, once. None while the calibration goes on.

        Empty if the engine cannot run so many requests at a time.
        """
        calibration = self._calibration
        assert calibration is not None
        if not calibration.is_done:
            return None
        self._calibration = None
        return [] if calibration.has_failed else calibration.seconds().tolist()

    def use_step_times(self, sizes: list[int], seconds: list[list[float]]) -> None:
        """Chooses lengths by the step times of a calibration, ``[sizes, lengths_to_measure]``."""
        table = between(self._to_try, lengths_to_measure(self._to_try), np.array(seconds))
        self._lengths = AutoLengths(StepTimes(sizes, self._to_try, table), self._largest)

    def weights_changed(self) -> None:
        """Policy or draft got other weights. Keys were dropped, or are those of the old weights."""
        self._lengths.weights_changed()
        # The update was no step.
        self._last_end = None

    def cache_was_reset(self) -> None:
        """All keys were dropped."""
        self._lengths.cache_was_reset()

    def drafted_per_pos(self) -> list[int]:
        """Drafts since the start that had at least 1, 2, ... tokens."""
        return self._drafted_per_pos.tolist()

    def planned_lengths(self) -> list[int]:
        """Length that is planned now for batch size 1, 2, ..."""
        return self._lengths.planned()

    def read_log(self) -> dict[str, Any]:
        """Steps since the last call, as the fields of ``types.LengthLog``."""
        log, self._log = self._log, StepLog(self._largest, self._most)
        return log.as_lists()

    def __getitem__(self, batch_size: int) -> int:
        """Number of tokens to draft in the next step. vLLM's scheduler asks, as if this were a list."""
        if self._is_idle:
            self._is_idle = False
            self._lengths.begin()
        if self._pinned is not None:
            return self._pinned
        return self._lengths.choose(batch_size) if self._calibration is None else self._calibration.choose()

    def observe(self, scheduled: SchedulerOutput, stats: Any, *, is_last: bool) -> None:
        """Takes in a step that has just ended.

        Args:
            stats: vLLM's ``SpecDecodingStats``. None if the step verified no drafts.
            is_last: the engine has no requests any more.
        """
        end = time.perf_counter()
        if scheduled.total_num_scheduled_tokens > 0:
            self._take(self._step(scheduled, stats, end))
        self._is_idle = is_last
        self._last_end = None if is_last else end

    def _step(self, scheduled: SchedulerOutput, stats: Any, end: float) -> EngineStep:
        batch_size = len(scheduled.num_scheduled_tokens)
        verified, self._last_drafted = self._last_drafted, scheduled.num_spec_tokens_to_schedule
        is_decode = scheduled.total_num_scheduled_tokens == batch_size * (1 + max(verified, 0))
        seconds = end - self._last_end if is_decode and self._last_end is not None else None
        drafted_per_pos = accepted_per_pos = np.zeros(self._most, np.int64)
        if stats is not None:
            drafted_per_pos = np.array(stats.num_draft_tokens_per_pos)
            accepted_per_pos = np.array(stats.num_accepted_tokens_per_pos)
        return EngineStep(batch_size, verified, self._last_drafted, seconds, drafted_per_pos, accepted_per_pos)

    def _take(self, step: EngineStep) -> None:
        self._drafted_per_pos += step.drafted_per_pos
        if self._calibration is not None:
            self._calibration.observe(step)
        elif self._pinned is None:
            self._log.add(step, self._lengths.expected(step.batch_size))
            self._lengths.observe(step)


class _ChosenLengths:
    """Part of a scheduler that asks a ``Speculation`` for the length of drafts, and tells it about steps."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        me: Any = self
        self.speculation = me.dynamic_sd_lookup = Speculation(
            me.vllm_config.additional_config[TABLE],
            me.scheduler_config.max_num_seqs,
            me.num_spec_tokens,
            has_model=me.vllm_config.speculative_config.uses_draft_kv_cache(),
        )

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> dict[int, Any]:
        me: Any = self
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self.speculation.observe(scheduler_output, _spec_stats(outputs), is_last=not me.has_unfinished_requests())
        return outputs


class SpeculationScheduler(_ChosenLengths, Scheduler):
    """The scheduler on CPU."""


class AsyncSpeculationScheduler(_ChosenLengths, AsyncScheduler):
    """The scheduler on GPUs, where vLLM schedules a step before the last one has ended."""


def _spec_stats(outputs: dict[int, Any]) -> Any:
    """vLLM's ``SpecDecodingStats`` of a step. None if it verified no drafts."""
    for output in outputs.values():
        if output.scheduler_stats is not None:
            return output.scheduler_stats.spec_decoding_stats
    return None
