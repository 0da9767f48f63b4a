"""Engines and workers as groups: how calls are split, how answers are joined, and how a lost actor is handled."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from skyrl_spec.data.packing import gather_shards
from skyrl_spec.errors import ActorError, ConfigError, LostActorError, RunError
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import (
    Component,
    Generation,
    LengthLog,
    Prompt,
    Proposals,
    ProposalScores,
    SampleRequest,
    SpecCounters,
    StepReport,
    StepTable,
    TrainBatch,
)

# Seconds between looks at the workers while engines are busy.
_LOOK_INTERVAL_S = 5.0
# Grace period to find which rank died first.
_DEATHS_HEARD_S = 5.0
# Seconds for an idle worker to answer that it is alive.
_PING_S = 60.0
# Ports tried for a GPU weight transfer.
_CONNECT_TRIES = 3
# Ray colours its part of a traceback.
_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Call = Callable[[Any], ray.ObjectRef]


def _call(method: str, *args: Any) -> Call:
    return lambda actor: getattr(actor, method).remote(*args)


class EngineGroup:
    """All rollout engines as one. An engine that dies, or does not answer in time, is replaced and asked again.

    Every response has its own random stream, so a repeated call gives the same answer.

    Args:
        start: builds engine number i and waits for it.
        max_restarts: limit on restarts, counted over all engines.
        while_waiting: called every few seconds while engines work; raises if something else failed.
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

    def generate(
        self,
        prompts: list[Prompt],
        sampling: SamplingConfig,
        n: int,
        seed: int,
        places: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        """``n`` responses to each prompt. ``places``: the engine of each prompt; None: one after the other."""
        num_engines = len(self.handles)
        shares: dict[int, list[int]] = {}
        for index, place in enumerate(places or self.places(len(prompts))):
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


class PolicyGroup:
    """All policy workers as one. A batch is put into the object store once, and every rank reads its shard there.

    Every call goes to all ranks. If one rank is lost, the others may wait for it for ever, so the first failure ends
    the call.
    """

    def __init__(
        self,
        handles: list[Any],
        places: list[tuple[int, int]],
        timeout_s: float,
        gpus: Sequence[PlacementGroup] = (),
    ):
        """Takes workers that are started.

        Args:
            places: data-parallel and tensor-parallel rank of each worker.
            timeout_s: seconds for the workers to answer one call (``trainer.placement.worker_timeout_s``).
            gpus: reserved GPUs, which ``shutdown`` releases.
        """
        self.handles, self._timeout_s, self._gpus = handles, timeout_s, gpus
        # Tensor-parallel rank 0 of each replica answers for it.
        self._leaders = [places.index((dp_rank, 0)) for dp_rank in range(1 + max(dp for dp, _ in places))]

    def check(self) -> None:
        """Checks that all workers are alive. Call it only while they are idle."""
        self._all("ping", deadline=Deadline(_PING_S, "a minute while idle"))

    def forward_logprobs(self, batch: TrainBatch, *, policy: bool = True) -> TrainBatch:
        """``batch`` with log-probs of the policy, and of the reference, before the updates on this batch.

        ``policy=False`` leaves out the policy.
        """
        answers = self._all("forward_logprobs", ray.put(batch), policy)
        return replace(batch, **gather_shards(batch, [answers[leader] for leader in self._leaders]))

    def keep_draft(self, copy: str) -> None:
        """Keeps the draft's weights of now under this name."""
        self._all("keep_draft", copy)

    def restore_draft(self, copy: str) -> None:
        """Sets the draft back to a copy that was kept."""
        self._all("restore_draft", copy)

    def train_mini_batch(self, batch: TrainBatch, *, draft: bool = True, scored: tuple[str, ...] = ()) -> StepReport:
        """One optimizer step, of the draft too unless ``draft=False``. Metrics and log-probs cover all ranks.

        ``scored``: copies of the draft whose acceptance length is predicted.
        """
        answers: list[StepReport] = self._all("train_mini_batch", ray.put(batch), draft, scored)
        shards = [answers[leader].policy_logprobs for leader in self._leaders]
        known = [{"logprobs": shard} for shard in shards if shard is not None]
        return replace(answers[0], policy_logprobs=gather_shards(batch, known)["logprobs"]) if known else answers[0]

    def train_draft(self, batch: TrainBatch) -> StepReport:
        """One optimizer step of the draft alone."""
        return self._all("train_draft", ray.put(batch))[0]

    def score_proposals(self, proposals: list[Proposals]) -> ProposalScores:
        """Log-probs of policy and draft for an engine's responses and drafted tokens."""
        return self._all("score_proposals", ray.put(proposals))[0]

    def export(self, component: Component) -> list[tuple[ray.ObjectRef, int]]:
        """Weights in Ray's object store: chunks and their sizes in bytes."""
        return self._all("export", component)[0]

    def connect(self, backend: str, engines: list[Any], components: list[Component], timeout_s: float) -> None:
        """Opens one of vLLM's own transfers to the engines.

        vLLM binds the port itself, so another process may take it first; then it is tried again with another port.
        Engines that wait at the first port answer again once their attempt to connect has timed out.
        """
        for attempt in range(1, _CONNECT_TRIES + 1):
            address = ray.get(self.handles[0].free_address.remote())
            try:
                self._all("connect", backend, engines, components, address, deadline=_transfer_deadline(timeout_s))
                return
            except ActorError as error:
                if attempt == _CONNECT_TRIES or "address already in use" not in error.traceback.lower():
                    raise

    def send(self, component: Component, timeout_s: float) -> int:
        """One update of the engines through ``connect``'s transfer; returns the bytes sent.

        Raises:
            LostActorError: a rank died, or the update took longer than ``timeout_s``: if an engine fails, the sender
                waits inside NCCL.
        """
        return self._all("send", component, deadline=_transfer_deadline(timeout_s))[0]

    def save_checkpoint(self, directory: Path, extra: dict[str, Any]) -> None:
        """Writes ``directory`` from all ranks. It appears once it is complete."""
        self._all("save_checkpoint", directory, extra)

    def load_checkpoint(self, directory: Path) -> dict[str, Any]:
        """Loads a checkpoint on all ranks; returns the driver's part of it."""
        return self._all("load_checkpoint", directory)[0]

    def export_checkpoint(self, directory: Path, target: Path) -> None:
        """Exports a checkpoint as ``skyrl-spec export`` does. One worker reads it, the others are idle."""
        reference = self.handles[0].export_checkpoint.remote(directory, target)
        try:
            ray.get(reference, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError:
            setting = f"trainer.placement.worker_timeout_s={self._timeout_s:g}"
            raise LostActorError(f"policy worker 0 did not export {directory} within {setting}") from None

    def save_hf(self, run_dir: Path) -> None:
        """Writes ``run_dir/model``, and ``run_dir/draft`` if the draft has its own directory."""
        self._all("save_hf", run_dir)

    def save_draft_hf(self, run_dir: Path) -> None:
        """Writes the draft alone, to where ``save_hf`` would write it."""
        self._all("save_draft_hf", run_dir)

    def shutdown(self) -> None:
        """Ends the workers and releases their GPUs. Engines on these GPUs end too."""
        for handle in self.handles:
            ray.kill(handle)
        for group in self._gpus:
            remove_placement_group(group)

    def _all(self, method: str, *args: Any, deadline: Deadline | None = None) -> list[Any]:
        """Answers of all ranks, in their order.

        Raises:
            LostActorError: a rank died, or one did not answer in time.
            ActorError: a rank raised an exception.
        """
        deadline = deadline or Deadline(
            self._timeout_s, f"trainer.placement.worker_timeout_s={self._timeout_s:g}: it hangs, or needs more time"
        )
        refs = [getattr(worker, method).remote(*args) for worker in self.handles]
        waiting, answers, start = list(refs), {}, time.monotonic()
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=max(0.0, start + deadline.seconds - time.monotonic()))
            if not ready:
                rank = refs.index(waiting[0])
                raise LostActorError(f"policy worker {rank} did not answer {method} within {deadline.words}")
            (ref,) = ready
            try:
                answers[ref] = ray.get(ref)
            except ray.exceptions.RayActorError as error:
                raise self._lost(refs.index(ref), error) from None
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ConfigError | RunError):
                    # If another rank died, this one only failed in a collective: report the death.
                    self._raise_first_death(refs, waiting)
                    raise actor_error(f"policy worker {refs.index(ref)} of {len(refs)}", error) from None
                raise
        return [answers[ref] for ref in refs]

    def _raise_first_death(self, refs: list[ray.ObjectRef], waiting: list[ray.ObjectRef]) -> None:
        deadline = time.monotonic() + _DEATHS_HEARD_S
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            ready, waiting = ray.wait(waiting, timeout=left_s)
            for ref in ready:
                try:
                    ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    raise self._lost(refs.index(ref), error) from None
                except ray.exceptions.RayTaskError:
                    continue

    def _lost(self, rank: int, error: Exception) -> LostActorError:
        return LostActorError(f"policy worker {rank} of {len(self.handles)} died ({cause_of_death(error)})")


class Deadline(NamedTuple):
    """Seconds for an answer, and the words of an error about them: the setting, and what it may mean."""

    seconds: float
    words: str


def _transfer_deadline(timeout_s: float) -> Deadline:
    setting = f"generator.inference_engine.generate_timeout_s={timeout_s:g}"
    return Deadline(timeout_s, f"{setting}: an engine died or failed (-v shows why)")


def actor_error(who: str, error: ray.exceptions.RayTaskError) -> ActorError:
    """The exception that an actor raised, as one line with its traceback attached."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    first_line = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    raised = ActorError(f"{who} raised {type(cause).__name__}: {first_line[:200]}".rstrip(": "))
    raised.traceback = _TERMINAL_COLOUR.sub("", str(error))
    return raised


def cause_of_death(error: BaseException) -> str:
    """Last line of an actor's error, without a traceback and without Ray's list of common causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.sub(r".*Worker exit detail: (.*?) Some common causes include.*", r"killed or crashed: \1", lines[-1])
    return line[:200]
