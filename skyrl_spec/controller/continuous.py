"""Sampling that never stops (``trainer.fully_async.max_staleness_steps`` of 2 and more).

A thread keeps groups running in the engines: when a response ends, its environment plays, and its next turn or another
group begins. A step takes the first groups that have finished. At the end of a step requests are set aside for the
sync, and go on with the new weights:

    engines:   g1 ====|   g3 ===========:======|       (":" sync: g2 and g3 span two versions)
               g2 ==================:====|   g4 ...
    workers:   |  step 1 on g1, ...  |  step 2 on g2, ...

How old a group may be: no token of a batch is from weights more than ``max_staleness_steps`` training steps old. So a
group that begins at version v is trained on in the step that begins at version v + max_staleness_steps at the latest.
No more groups run than those steps can take, and a batch waits for old groups where later steps could not take them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from skyrl_spec.algorithms.filters import FILTERS, Collected, Group
from skyrl_spec.controller.conversation import Conversation
from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.fidelity import span_metrics
from skyrl_spec.controller.groups import OpenGroup, choose, group_state, rollout_of
from skyrl_spec.controller.measures import idle_shares
from skyrl_spec.controller.requests import RunningRequests
from skyrl_spec.controller.rollouts import RolloutSampler, SpeculationMeter, print_failures, reward_metrics
from skyrl_spec.controller.source import FilterReport, Sampled
from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.envs.episodes import EnvResult
from skyrl_spec.envs.grader import require_few
from skyrl_spec.metrics import names
from skyrl_spec.rollout.seeds import seed_of
from skyrl_spec.settings.derived import max_staleness
from skyrl_spec.settings.schema import Config
from skyrl_spec.types import Generation, Prompt, SampleRequest, Versions

# Seconds that the thread waits for an engine's or an environment's answer before it looks around.
_POLL_S = 0.05
# Seconds between looks for errors and signals, of a step that waits.
_LOOK_S = 0.2
# Longest time for the thread to end.
_END_S = 10.0


class Continuous:
    """Groups that run in the engines at all times. A ``source.Source``."""

    is_sampling = False

    def __init__(self, config: Config, sampler: RolloutSampler, engines: EngineGroup, stream: PromptStream):
        self._config, self._sampler, self._engines, self._stream = config, sampler, engines, stream
        self._size = config.trainer.train_batch_size
        self._max_staleness = max_staleness(config)
        # Whether a sync waits for what was begun.
        self._is_awaited = config.trainer.fully_async.running_requests == "wait"
        self._requests = RunningRequests(engines, config.generator.sampling_params)
        self._keep = FILTERS[config.trainer.algorithm.dynamic_sampling.type]
        self._filter_report = FilterReport(config)
        self._keeps_keys = config.trainer.fully_async.running_requests == "keep"
        self._thread = threading.Thread(target=self._guarded_run, daemon=True, name="sampling")
        # What follows is shared with the thread.
        self._changed = threading.Condition()
        self._groups: dict[int, OpenGroup] = {}
        # Prompts that were taken from the stream and not begun.
        self._queue: list[Prompt] = []
        self._num_begun, self._version = 0, 0
        # Groups that are trained on, and those that the rest of the run can still take.
        self._num_in_training, self._num_wanted = 0, 0
        self._wants_hold, self._is_held, self._is_closed = False, False, False
        self._error: BaseException | None = None
        # Since a step took its groups.
        self._sampled: list[Group] = []
        # Seconds for which engines had requests: in all, when the step began, and when it took its groups.
        self._busy_s = self._busy_at_start_s = self._busy_at_take_s = 0.0
        # Of the thread alone.
        self._asked: dict[int, tuple[OpenGroup, Conversation]] = {}
        self._num_asked, self._num_playing = 0, 0
        self._played: SimpleQueue[tuple[OpenGroup, Conversation, Future[EnvResult]]] = SimpleQueue()
        # Tokens of a prompt's responses when it was last sampled.
        self._lengths: dict[str, float] = {}

    def start(self, versions: Versions, num_steps: int) -> None:
        """Begins to sample for so many steps, with engines that have these weights."""
        self._version, self._num_wanted = versions.policy, num_steps * self._size
        self._speculation = SpeculationMeter(self._engines, "train")
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether there are no more groups, and no more prompts."""
        with self._changed:
            return not self._groups and not self._has_prompts

    def take(self, versions: Versions) -> Sampled:
        """The first groups that have finished. Metrics are those of all that has finished since the last step.

        Fewer than a batch if the prompts are over, or if dynamic sampling has sampled ``max_sample_batches``.
        """
        start = time.perf_counter()
        with self._changed:
            self._busy_at_start_s = self._busy_s
            while (chosen := self._choose(versions.policy)) is None:
                self._changed.wait(_LOOK_S)
                self._raise_error()
            for group in chosen:
                del self._groups[group.number]
            self._num_in_training = len(chosen)
            sampled, self._sampled = self._sampled, []
            busy_s, self._busy_at_take_s = self._busy_s - self._busy_at_take_s, self._busy_s
        errors = print_failures(sampled)
        require_few(errors, sum(map(len, sampled)), self._config.environment)
        groups = [group.rollouts for group in chosen if group.rollouts is not None]
        num_kept = sum(len(self._keep([group])) for group in sampled)
        collected = Collected(groups, sampled, -(-len(sampled) // self._size), num_kept)
        waited_s = time.perf_counter() - start
        return Sampled(groups, self._values(collected, busy_s), {"generate": waited_s}, waited_s)

    def _values(self, collected: Collected, busy_s: float) -> dict[str, float]:
        """Metrics of sampling. ``busy_s``: seconds that it took."""
        generator, values = self._config.generator, self._filter_report.metrics(collected)
        # Nothing may have finished since the last step, whose groups had all finished before.
        if finished := collected.sampled or collected.groups:
            values |= reward_metrics(finished, generator.n_samples_per_prompt, generator.max_turns)
        num_tokens = sum(len(one.generation.token_ids) for group in collected.sampled for one in group)
        return values | ({names.THROUGHPUT: num_tokens / busy_s} if busy_s else {})

    def beside(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def draft_metrics(self) -> dict[str, float]:
        return self._speculation.metrics()

    @contextmanager
    def held(self, *, keeps_keys: bool = False) -> Iterator[None]:
        """Requests go on afterwards. With ``trainer.fully_async.running_requests=wait`` there are none left."""
        with self._changed:
            self._wants_hold = True
            while not self._is_held:
                self._changed.wait(_LOOK_S)
                self._raise_error()
        self._engines.all("pause" if keeps_keys else "set_aside")
        yield
        # Metrics of drafts are those of rollouts.
        self._speculation = SpeculationMeter(self._engines, "train")
        self._engines.all("go_on")
        with self._changed:
            self._wants_hold = False
            self._changed.notify_all()

    def trained(self, versions: Versions) -> None:
        """Notes the end of a step: engines have these weights, and its groups make room for others."""
        with self._changed:
            self._version = versions.policy
            self._num_wanted -= self._size
            self._num_in_training = 0
            self._changed.notify_all()

    def step_metrics(self, sampled: Sampled, timings: dict[str, float]) -> dict[str, float]:
        with self._changed:
            busy_s = self._busy_s - self._busy_at_start_s
        return idle_shares(timings, busy_s) | span_metrics(sampled.rollouts, keeps_keys=self._keeps_keys)

    def close(self) -> None:
        """The engines must end afterwards, or they would go on."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_END_S)
        self._sampler.close()

    def state_dict(self) -> dict[str, Any]:
        """State of the stream of prompts, groups that are not trained on and prompts behind them, of one moment."""
        with self._changed:
            running = {
                "num_begun": self._num_begun,
                "queue": [prompt.uid for prompt in self._queue],
                "groups": [group_state(group) for group in self._groups.values()],
            }
            stream = self._stream.state_dict()
        return {"stream": stream, "running": running, "num_train_calls": self._sampler.num_train_calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Finished groups stay; the others begin anew."""
        self._sampler.num_train_calls = state["num_train_calls"]
        if "running" in state:
            self._load_running(state["running"])

    def _load_running(self, state: dict[str, Any]) -> None:
        prompts = {prompt.uid: prompt for prompt in self._stream.prompts}
        self._num_begun = state["num_begun"]
        for saved in state["groups"]:
            if saved["rollouts"] is not None and saved["uid"] in prompts:
                group = OpenGroup(saved["number"], prompts[saved["uid"]], saved["began"])
                group.rollouts = [rollout_of(group.prompt, one) for one in saved["rollouts"]]
                self._groups[group.number] = group
        running = [saved["uid"] for saved in state["groups"] if saved["rollouts"] is None]
        self._queue = [prompts[uid] for uid in [*running, *state["queue"]] if uid in prompts]

    @property
    def _has_prompts(self) -> bool:
        return bool(self._queue) or self._stream.epoch < self._config.trainer.epochs

    def _choose(self, version: int) -> list[OpenGroup] | None:
        dynamic = self._config.trainer.algorithm.dynamic_sampling
        is_enough = dynamic.type is not None and len(self._sampled) >= dynamic.max_sample_batches * self._size
        least = 0 if is_enough else self._size
        chosen = choose(list(self._groups.values()), version, self._size, self._max_staleness, least)
        # While groups are few, others are about to begin.
        must_wait = chosen is not None and len(chosen) < least and self._has_prompts
        return None if must_wait else chosen

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # From here on: the thread.

    def _guarded_run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _run(self) -> None:
        while not self._is_closed:
            waits = self._is_awaited and bool(self._asked or self._num_playing)
            if self._wants_hold and not waits:
                self._hold()
            start = time.perf_counter()
            if not (self._wants_hold and waits):
                self._begin_groups()
            self._take_answers(self._requests.poll(_POLL_S))
            self._take_results(wait=not self._requests)
            if self._requests:
                with self._changed:
                    self._busy_s += time.perf_counter() - start

    def _hold(self) -> None:
        self._take_answers(self._requests.drain())
        with self._changed:
            self._is_held = True
            self._changed.notify_all()
            while self._wants_hold and not self._is_closed:
                self._changed.wait()
            self._is_held = False

    def _begin_groups(self) -> None:
        """Begins as many groups as the next steps can take in time."""
        while (group := self._next_group()) is not None:
            place = self._requests.least_loaded()
            for _ in range(self._config.generator.n_samples_per_prompt):
                group.conversations.append(self._sampler.conversations.begin(group.prompt, place))
            for conversation in group.conversations:
                self._ask(group, conversation)

    def _next_group(self) -> OpenGroup | None:
        with self._changed:
            room = min((self._max_staleness + 1) * self._size, self._num_wanted)
            if len(self._groups) + self._num_in_training >= room or not self._has_prompts:
                return None
            if not self._queue:
                # Long ones first, so that none is left alone at the end.
                batch = self._stream.next_batch()
                self._queue = sorted(batch, key=lambda prompt: -self._lengths.get(prompt.uid, 0.0))
            self._num_begun += 1
            group = OpenGroup(self._num_begun, self._queue.pop(0), self._version)
            self._groups[group.number] = group
            return group

    def _ask(self, group: OpenGroup, conversation: Conversation) -> None:
        """Asks an engine for the next turn."""
        self._num_asked += 1
        self._asked[self._num_asked] = group, conversation
        seed = seed_of(self._config.trainer.seed, group.number, conversation.number, len(conversation.texts))
        self._requests.add(conversation.place, SampleRequest(self._num_asked, conversation.input_ids, seed))

    def _take_answers(self, answers: Sequence[tuple[int, Generation]]) -> None:
        """Lets environments play what the engines sampled."""
        if not answers:
            return
        asked = [self._asked.pop(key) for key, _ in answers]
        conversations = [conversation for _, conversation in asked]
        turns = self._sampler.conversations.add_turns(conversations, [generation for _, generation in answers])
        for (group, conversation), turn in zip(asked, turns, strict=True):
            put: Callable[[Future[EnvResult]], None] = partial(self._put_result, group, conversation)
            self._num_playing += 1
            self._sampler.grader.submit(turn).add_done_callback(put)

    def _put_result(self, group: OpenGroup, conversation: Conversation, result: Future[EnvResult]) -> None:
        self._played.put((group, conversation, result))

    def _take_results(self, *, wait: bool) -> None:
        """Goes on with conversations whose environments have answered."""
        while True:
            try:
                group, conversation, result = self._played.get(timeout=_POLL_S) if wait else self._played.get_nowait()
            except Empty:
                return
            wait = False
            self._num_playing -= 1
            self._sampler.conversations.take(conversation, result.result())
            if conversation.is_open:
                self._ask(group, conversation)
            elif not any(one.is_open for one in group.conversations):
                self._finish(group)

    def _finish(self, group: OpenGroup) -> None:
        self._sampler.grader.end_episodes([conversation.number for conversation in group.conversations])
        rollouts = [self._sampler.conversations.rollout(conversation) for conversation in group.conversations]
        group.conversations = []
        self._lengths[group.prompt.uid] = max(len(one.generation.token_ids) for one in rollouts)
        with self._changed:
            self._sampled.append(rollouts)
            if self._keep([rollouts]):
                group.rollouts = rollouts
            else:
                del self._groups[group.number]
            self._changed.notify_all()
