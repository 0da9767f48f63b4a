"""vLLM's schedulers with a number of drafted tokens that follows the batch (``scheduler_cls``).

vLLM looks the length of the next draft up in ``dynamic_sd_lookup``, by batch size, in every step. Here the lookup asks a
``Lengths``, which also hears how long each step took and what it accepted. It lives in the process of vLLM's engine core.
``EngineCore.call_scheduler`` (``vllm_patches``) brings the calls of ``RolloutEngine`` there.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from skyrl_spec.rollout.lengths import AutoLengths, EngineStep, Lengths, LengthTable, StepLog
from skyrl_spec.rollout.step_times import OFF, Calibration, StepTimes, lengths_to_try

# Key of vLLM's additional_config: the length for batch size 1, 2, ..., or None to choose it.
TABLE = "skyrl_spec_lengths"
PATHS = {"cpu": f"{__name__}.SpeculationScheduler", "cuda": f"{__name__}.AsyncSpeculationScheduler"}


class _ChosenLengths:
    """Part of a scheduler that decides the length of drafts, and measures steps."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        me: Any = self
        table = me.vllm_config.additional_config.get(TABLE)
        self._largest = me.scheduler_config.max_num_seqs
        self._to_try = lengths_to_try(
            me.num_spec_tokens, has_model=me.vllm_config.speculative_config.uses_draft_kv_cache()
        )
        # Until the steps are calibrated, all drafts are as long as possible.
        self._lengths: Lengths = LengthTable(table or [me.num_spec_tokens] * self._largest)
        self._is_chosen = table is None
        self._pinned: int | None = None
        self._calibration: Calibration | None = None
        # Length of the last step, and when it ended; None after a pause.
        self._last_drafted, self._last_end = OFF, None
        self._is_idle = True
        self._log = StepLog(self._largest, me.num_spec_tokens)
        # Drafts that had at least 1, 2, ... tokens since the start. vLLM has no such counter.
        self._drafted_per_pos = np.zeros(me.num_spec_tokens, np.int64)
        me.dynamic_sd_lookup = _Lookup(self)

    # ---- Calls of RolloutEngine -------------------------------------------------------------------------------------

    def pin_length(self, length: int | None) -> None:
        """Drafts ``length`` tokens in every step from now on; None ends this."""
        self._pinned = length

    def start_calibration(self, batch_size: int) -> None:
        """Tries all lengths in turns while the engine has ``batch_size`` requests."""
        self._calibration = Calibration(batch_size, self._to_try)

    def calibrated_seconds(self) -> list[float] | None:
        """Seconds of a step for each of ``lengths_to_try``, once. None while the calibration goes on.

        Empty if the engine cannot run so many requests at a time.
        """
        calibration = self._calibration
        assert calibration is not None
        if not calibration.is_done:
            return None
        self._calibration = None
        return [] if calibration.has_failed else calibration.seconds().tolist()

    def use_step_times(self, sizes: list[int], seconds: list[list[float]]) -> None:
        """Chooses lengths by the step times of a calibration, ``[sizes, lengths_to_try]``."""
        self._lengths = AutoLengths(StepTimes(sizes, self._to_try, np.array(seconds)), self._largest)

    def needs_calibration(self) -> bool:
        """Whether lengths are to be chosen and step times are not known."""
        return self._is_chosen and isinstance(self._lengths, LengthTable)

    def weights_changed(self) -> None:
        self._lengths.weights_changed()

    def drafted_per_pos(self) -> list[int]:
        """Drafts since the start that had at least 1, 2, ... tokens."""
        return self._drafted_per_pos.tolist()

    def read_log(self) -> dict[str, Any]:
        """Steps since the last call, as the fields of ``types.LengthLog``, and the lengths planned now."""
        me: Any = self
        log, self._log = self._log, StepLog(self._largest, me.num_spec_tokens)
        return log.as_lists() | {"planned": self._lengths.planned()}

    # ---- vLLM's scheduler -------------------------------------------------------------------------------------------

    def next_length(self, batch_size: int) -> int:
        if self._pinned is not None:
            return self._pinned
        if self._calibration is not None:
            return self._calibration.choose()
        if self._is_idle:
            self._is_idle = False
            self._lengths.begin()
        return self._lengths.choose(batch_size)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> dict[int, Any]:
        me: Any = self
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        end = time.perf_counter()
        if scheduler_output.total_num_scheduled_tokens > 0:
            self._observe(scheduler_output, _spec_stats(outputs), end)
        self._is_idle = not me.has_unfinished_requests()
        self._last_end = None if self._is_idle else end
        return outputs

    def _observe(self, scheduler_output: SchedulerOutput, stats: Any, end: float) -> None:
        me: Any = self
        batch_size = len(scheduler_output.num_scheduled_tokens)
        verified, drafted = self._last_drafted, scheduler_output.num_spec_tokens_to_schedule
        self._last_drafted = drafted
        is_decode = scheduler_output.total_num_scheduled_tokens == batch_size * (1 + max(verified, 0))
        seconds = end - self._last_end if is_decode and self._last_end is not None else None
        drafted_per_pos = accepted_per_pos = np.zeros(me.num_spec_tokens, np.int64)
        if stats is not None:
            drafted_per_pos = np.array(stats.num_draft_tokens_per_pos)
            accepted_per_pos = np.array(stats.num_accepted_tokens_per_pos)
        self._drafted_per_pos += drafted_per_pos
        step = EngineStep(batch_size, verified, drafted, seconds, drafted_per_pos, accepted_per_pos)
        if self._calibration is not None:
            if step.is_steady:
                self._calibration.observe(batch_size, drafted, seconds)
        elif self._pinned is None:
            self._log.add(step, self._lengths.expected_tokens_per_s(batch_size))
            self._lengths.observe(step)


class SpeculationScheduler(_ChosenLengths, Scheduler):
    """On CPU."""


class AsyncSpeculationScheduler(_ChosenLengths, AsyncScheduler):
    """On GPUs: vLLM schedules a step before the last one has ended."""


class _Lookup:
    """Stands in for vLLM's list of lengths by batch size."""

    def __init__(self, scheduler: _ChosenLengths):
        self._scheduler = scheduler

    def __getitem__(self, batch_size: int) -> int:
        return self._scheduler.next_length(batch_size)


def _spec_stats(outputs: dict[int, Any]) -> Any:
    """vLLM's ``SpecDecodingStats`` of a step. None if it verified no drafts."""
    for output in outputs.values():
        if output.scheduler_stats is not None:
            return output.scheduler_stats.spec_decoding_stats
    return None
