"""Rollout engines as one: how calls are split, how answers are joined, and how a lost engine is replaced."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from skyrl_spec.controller.actor_errors import cause_of_death
from skyrl_spec.errors import LostActorError, RunError
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import (
    Generation,
    LengthLog,
    Prompt,
    Proposals,
    SampleRequest,
    SpecCounters,
    StepTable,
)

# Seconds between looks at the workers while engines are busy.
_LOOK_INTERVAL_S = 5.0

Call = Callable[[Any], ray.ObjectRef]


def _call(method: str, *args: Any) -> Call:
    return lambda actor: getattr(actor, method).remote(*args)


class EngineGroup:
    """All rollout engines as one. An engine that dies, or does not answer in time, is replaced and asked again.

    Every response has its own random stream, so a repeated call gives the same answer.

    Args:
        start: builds engine number i and waits for it.
        max_restarts: limit on restarts, counted over all engines.
        while_waiting: called now and then while engines work; raises if something else failed.
    """

    def __init__(
        self,
        handles: list[Any],
        timeout_s: float,
        start: Callable[[int], Any] | None = None,
        max_restarts: int = 0,
        while_waiting: Callable[[], None] = lambda: None,
    ):
        self.handles, self.timeout_s = handles, timeout_s
        self._start, self._while_waiting = start, while_waiting
        self._looked = time.monotonic()
        self._bring_up: Callable[[Any], None] | None = None
        self._max_restarts = max_restarts
        # Number of times that each engine was replaced.
        self.restarts = [0] * len(handles)
        # Last counters read from each engine, and the sum over engines that were replaced.
        self._counters = [SpecCounters()] * len(handles)
        self._counters_of_lost = SpecCounters()
        self._silence = f"did not answer within generator.inference_engine.generate_timeout_s={timeout_s:g}"
        # Step times of each engine, where it chooses the lengths of its drafts.
        self._step_times: list[StepTable | None] = [None] * len(handles)

    def allow_replacement(self, bring_up: Callable[[Any], None]) -> None:
        """Lets lost engines be replaced from now on. ``bring_up`` gives a new engine the weights of the others."""
        self._bring_up = bring_up

    def generate(self, prompts: list[Prompt], sampling: SamplingConfig, n: int, seed: int) -> list[list[Generation]]:
        """``n`` responses to each prompt, in one call to each engine."""
        num_engines = len(self.handles)
        shares: dict[int, list[int]] = {}
        for index, place in enumerate(self.places(len(prompts))):
            shares.setdefault(place, []).append(index)
        answers = self._ask(
            {
                place: _call(
                    "generate", [prompts[index].token_ids for index in share], sampling, n, seed * num_engines + place
                )
                for place, share in shares.items()
            }
        )
        out: list[list[Generation]] = [[] for _ in prompts]
        for place, share in shares.items():
            for index, answer in zip(share, answers[place], strict=True):
                out[index] = answer
        return out

    def advance(
        self, place: int, requests: Sequence[SampleRequest], sampling: SamplingConfig, seconds: float
    ) -> ray.ObjectRef:
        """Lets an engine take these requests and sample so long, beside what it has; see ``RolloutEngine.advance``."""
        return self.handles[place].advance.remote(list(requests), sampling, seconds)

    def answer_or_replace(self, ref: ray.ObjectRef, place: int) -> Any:
        """Answer of an engine, or None if it was lost and has been replaced.

        Raises:
            LostActorError: it is lost and cannot be replaced.
        """
        answer, problem = self._answer(ref)
        if problem:
            self._replace(place, problem)
        return answer

    def look_around(self) -> None:
        """Raises if something else failed while engines work. Looks every few seconds at most."""
        if time.monotonic() - self._looked > _LOOK_INTERVAL_S:
            self._while_waiting()
            self._looked = time.monotonic()

    def replace_silent(self, place: int) -> None:
        """Replaces an engine that did not answer in time. Raises as ``answer_or_replace``."""
        self._replace(place, self._silence)

    def places(self, num_prompts: int) -> list[int]:
        """Engines of so many prompts: one after the other."""
        return [index % len(self.handles) for index in range(num_prompts)]

    def propose(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[list[Proposals]]:
        """Responses of each engine to the same prompts, with the tokens that its draft proposed."""
        return self.all("propose", prompts, sampling, seed)

    def propose_on_one(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[Proposals]:
        """Responses of the first engine, with the tokens that its draft proposed."""
        return self._ask({0: _call("propose", prompts, sampling, seed)})[0]

    def spec_counters(self) -> SpecCounters:
        """Counters of speculation since the engines started, summed over engines.

        Counters of a lost engine are those of the last call of this method.
        """
        self._counters = self.all("spec_counters")
        return sum(self._counters, self._counters_of_lost)

    def calibrate(self, prompts: list[Prompt], sampling: SamplingConfig, largest: int) -> bool:
        """Lets engines that choose the lengths of their drafts measure steps, up to ``largest`` responses at a time.

        Returns whether there are such engines. A replacement uses the step times of the engine that was lost.
        """
        self._step_times = self.all("calibrate", [prompt.token_ids for prompt in prompts], sampling, largest)
        return any(table is not None for table in self._step_times)

    def read_lengths(self) -> list[LengthLog]:
        """Steps of each engine since the last call. Empty with a fixed length."""
        return [log for log in self.all("read_lengths") if log is not None]

    def all(self, method: str, *args: Any) -> list[Any]:
        """Answers of every engine to the same call. The call may be repeated."""
        call = _call(method, *args)
        answers = self._ask(dict.fromkeys(range(len(self.handles)), call))
        return [answers[index] for index in range(len(self.handles))]

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """Ends the engines. Each may first free what it shares with other processes, unless it stays busy too long.

        May be called more than once. Calls that wait in another thread end with ``LostActorError``.
        """
        self._start = None
        handles, self.handles = self.handles, []
        if handles:
            ray.wait([engine.shutdown.remote() for engine in handles], num_returns=len(handles), timeout=timeout_s)
        for handle in handles:
            ray.kill(handle)

    def _ask(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        """Answers by engine.

        Raises:
            LostActorError: an engine is lost and cannot be replaced.
        """
        answers: dict[int, Any] = {}
        waiting: dict[ray.ObjectRef, tuple[int, float]] = {}

        def ask(index: int) -> None:
            waiting[calls[index](self.handles[index])] = index, time.monotonic() + self.timeout_s

        for index in calls:
            ask(index)
        while waiting:
            left_s = min(deadline for _, deadline in waiting.values()) - time.monotonic()
            ready, _ = ray.wait(list(waiting), timeout=min(max(left_s, 0.0), _LOOK_INTERVAL_S))
            overdue = [ref for ref, (_, deadline) in waiting.items() if deadline <= time.monotonic()]
            for ref in ready or overdue:
                index, _ = waiting.pop(ref)
                problem = self._silence
                if ready:
                    answer, problem = self._answer(ref)
                if problem:
                    self._replace(index, problem)
                    ask(index)
                else:
                    answers[index] = answer
            if not ready and not overdue:
                self._while_waiting()
        return answers

    def _answer(self, ref: ray.ObjectRef) -> tuple[Any, str]:
        """Answer of an engine and an empty string, or None and why the engine is lost."""
        try:
            return ray.get(ref), ""
        except ray.exceptions.RayActorError as error:
            return None, f"died ({cause_of_death(error)})"
        except ray.exceptions.RayTaskError as error:
            # vLLM's engine process ended, and the actor cannot work without it.
            if type(error.cause).__name__ == "EngineDeadError":
                return None, f"died ({cause_of_death(error.cause)})"
            # If a worker died, the weights that it put into the object store are gone: report the worker.
            self._while_waiting()
            raise

    def _replace(self, index: int, problem: str) -> None:
        lost = f"rollout engine {index} {problem}"
        if self._start is None or self._bring_up is None:
            raise LostActorError(lost)
        if sum(self.restarts) == self._max_restarts:
            raise LostActorError(
                f"{lost}, and generator.inference_engine.max_restarts={self._max_restarts} were restarted before: "
                "look for the cause (memory?), or raise it"
            )
        self.restarts[index] += 1
        print(f"skyrl-spec: warning: {lost}; it is restarted, and its prompts are generated again", file=sys.stderr)
        self._counters_of_lost += self._counters[index]
        self._counters[index] = SpecCounters()
        ray.kill(self.handles[index])
        try:
            self.handles[index] = self._start(index)
            self._bring_up(self.handles[index])
            if (table := self._step_times[index]) is not None:
                ray.get(self.handles[index].use_step_times.remote(table), timeout=self.timeout_s)
        except (RunError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise LostActorError(f"{lost}, and could not be restarted ({cause_of_death(error)})") from None
