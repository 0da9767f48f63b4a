"""Policy workers as one: how a batch is split, how answers are joined, and what ends a call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from skyrl_spec.controller.actor_errors import actor_error, cause_of_death
from skyrl_spec.data.packing import gather_shards
from skyrl_spec.errors import ActorError, ConfigError, LostActorError, RunError
from skyrl_spec.types import (
    Component,
    Proposals,
    ProposalScores,
    StepReport,
    TrainBatch,
)

# Grace period to find which rank died first.
_DEATHS_HEARD_S = 5.0
# Seconds for an idle worker to answer that it is alive.
_PING_S = 60.0
# Ports tried for a GPU weight transfer.
_CONNECT_TRIES = 3


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
            places: data-parallel replica of each worker, and its number in the replica, whose first worker answers.
            timeout_s: seconds for the workers to answer one call (``trainer.placement.worker_timeout_s``).
            gpus: reserved GPUs, which ``shutdown`` releases.
        """
        self.handles, self._timeout_s, self._gpus = handles, timeout_s, gpus
        self._leaders = [places.index((replica, 0)) for replica in range(1 + max(number for number, _ in places))]

    def check(self) -> None:
        """Checks that all workers are alive. Call it only while they are idle."""
        self._all("ping", deadline=Deadline(_PING_S, "a minute while idle"))

    def forward_logprobs(self, batch: TrainBatch, *, policy: bool = True) -> TrainBatch:
        """``batch`` with log-probs of the policy, and of the reference, before the updates on this batch.

        ``policy=False`` leaves out the policy.
        """
        answers = self._all("forward_logprobs", ray.put(batch), policy)
        logprobs: dict[str, Any] = gather_shards(batch, [answers[leader] for leader in self._leaders])
        return replace(batch, **logprobs)

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
        report = answers[self._leaders[0]]
        return replace(report, policy_logprobs=gather_shards(batch, known)["logprobs"]) if known else report

    def offload_training_state(self) -> None:
        """Moves optimizer state and gradients to host memory, where the settings say so, until the next update."""
        self._all("offload_training_state")

    def offload_weights(self) -> None:
        """Moves weights to host memory, where the settings say so, until a call needs them."""
        self._all("offload_weights")

    def train_draft(self, batch: TrainBatch) -> StepReport:
        """One optimizer step of the draft alone."""
        return self._all("train_draft", ray.put(batch))[self._leaders[0]]

    def score_proposals(self, proposals: list[Proposals]) -> ProposalScores:
        """Log-probs of policy and draft for an engine's responses and drafted tokens."""
        return self._all("score_proposals", ray.put(proposals))[self._leaders[0]]

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

    def begin_save(self, directory: Path, extra: dict[str, Any]) -> None:
        """Begins to write ``directory`` beside training. ``finish_save`` must follow."""
        self._all("begin_save", directory, extra)

    def finish_save(self, *, wait: bool) -> bool:
        """Whether the save that was begun is complete. ``wait``: waits until it is.

        Raises:
            RunError: it could not be written.
        """
        return self._all("finish_save", wait)[0]

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
