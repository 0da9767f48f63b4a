"""One vLLM engine: sampling with a draft, acceptance counters, weight updates.

vLLM is imported when an engine is built, not with this module.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from skyrl_spec.drafts.speculation import require_exact_sampling, require_visible_draft
from skyrl_spec.rollout.anchors import drafted_anchors
from skyrl_spec.rollout.calibrate import measure_steps
from skyrl_spec.rollout.engine_settings import EngineSettings, engine_args, engine_environment, with_local_models
from skyrl_spec.rollout.requests import Requests
from skyrl_spec.rollout.seeds import prompt_seeds
from skyrl_spec.rollout.sleep import Sleep
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import (
    Component,
    Generation,
    LengthLog,
    Proposals,
    SampleRequest,
    SpecCounters,
    StepTable,
    Versions,
)

_COUNTERS = {counter.name for counter in fields(SpecCounters)}


class RolloutEngine:
    """A vLLM engine in this process. On CPU the process holds nothing else, because vLLM takes its threads."""

    def __init__(self, settings: EngineSettings):
        settings = with_local_models(settings)
        args = engine_args(settings)
        os.environ.update(engine_environment(settings))
        if settings.device == "cpu" and settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        from vllm import LLM

        from skyrl_spec.rollout import vllm_patches

        vllm_patches.register()
        self._settings = settings
        self._llm = LLM(**args)
        self._requests = Requests(self._llm.llm_engine)
        if settings.returns_experts:
            self._call_core("return_experts")
        # What callers call the running requests, and those that are set aside, by their names in vLLM.
        self._key_of: dict[str, int] = {}
        self._key_of_aside: dict[str, int] = {}
        self._sleep = Sleep(settings.synced)
        self._updated: Component = "policy"
        self.set_versions(Versions())

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, n: int, seed: int | None
    ) -> list[list[Generation]]:
        """``n`` responses to each prompt (token ids), in the order of the prompts, within ``max_model_len``.

        Log-probs are those of the distribution sampled from. On CPU with a ``seed``, every response has its own random
        stream and does not depend on the rest of the batch. Otherwise all responses draw from the engine's stream.

        Raises:
            ValueError: a prompt leaves no room for a response.
        """
        require_exact_sampling(sampling, self._settings.speculative_config)
        seeds: list[int | None] = [None] * len(prompts)
        if seed is not None:
            seeds = [*prompt_seeds(seed, len(prompts))]
        inputs = [self._request(ids, sampling, n, one) for ids, one in zip(prompts, seeds, strict=True)]
        names = [self._requests.add(*request) for request in inputs]
        outputs = self._requests.run(names)
        return [[self._generation(completion) for completion in output.outputs] for output in outputs]

    def advance(
        self, requests: list[SampleRequest], sampling: SamplingConfig, seconds: float
    ) -> list[tuple[int, Generation]]:
        """Takes in requests, samples for so many seconds, and returns what has finished since the last call, by key.

        Requests that have not finished go on in the next call, also if other calls come between. The call ends early
        if nothing is left to sample.
        """
        require_exact_sampling(sampling, self._settings.speculative_config)
        for request in requests:
            name = self._requests.add(*self._request(request.token_ids, sampling, 1, request.seed))
            self._key_of[name] = request.key
        self._requests.run_for(seconds)
        outputs = self._requests.take(list(self._key_of))
        return [(self._key_of.pop(name), self._generation(output.outputs[0])) for name, output in outputs.items()]

    def set_aside(self) -> None:
        """Stops all requests between two steps, and drops all keys. The engine is idle until ``go_on``."""
        self._call_core("set_aside")
        self._requests.set_aside()
        # One that finished at the last moment is not an answer to those who ask meanwhile.
        self._key_of, self._key_of_aside = {}, self._key_of
        if self._has_schedule:
            self._call_speculation("cache_was_reset")

    def pause(self) -> None:
        """Stops all requests between two steps, and keeps their keys. Nothing else can run until ``go_on``."""
        self._requests.set_aside()
        if self._has_own_process:
            self._call_core("pause_scheduler", "keep", False)

    def go_on(self) -> None:
        """Lets requests go on that were stopped. Those without keys compute them again, with the weights of now."""
        self._call_core("take_back")
        self._requests.take_back()
        self._key_of, self._key_of_aside = self._key_of | self._key_of_aside, {}
        if self._has_own_process:
            self._call_core("resume_scheduler")

    def _request(self, token_ids: list[int], sampling: SamplingConfig, n: int, seed: int | None) -> tuple[Any, Any]:
        """vLLM's prompt and sampling parameters."""
        self._sleep.require_awake()
        from vllm import SamplingParams, TokensPrompt

        if len(token_ids) >= self._settings.max_model_len:
            raise ValueError(f"a prompt of {len(token_ids)} tokens fills max_model_len={self._settings.max_model_len}")
        params = SamplingParams(
            n=n,
            # On GPUs vLLM samples each seeded request separately, with several kernels a step. Seeds serve to repeat
            # requests on a replacement engine. On GPUs engines are not replaced, so seeds are not needed.
            seed=seed if self._settings.device == "cpu" else None,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=min(sampling.max_generate_length, self._settings.max_model_len - len(token_ids)),
            # Of the sampled token only, as one list.
            logprobs=0,
            flat_logprobs=True,
            stop=list(sampling.stop) or None,
            detokenize=bool(sampling.stop),
        )
        # Keys of older weights are never used for a new request, also where they are still there.
        return TokensPrompt(prompt_token_ids=token_ids, cache_salt=self._versions.label), params

    def calibrate(self, prompts: list[list[int]], sampling: SamplingConfig, largest: int) -> StepTable | None:
        """Measures step times up to batch size ``largest`` and uses them. None with a schedule that needs none."""
        if self._settings.schedule != "auto" or self._settings.speculative_config is None:
            return None
        inputs = [self._request(ids, sampling, 1, 0)[0] for ids in prompts]
        _, endless = self._request(prompts[0], sampling, 1, 0)
        endless.ignore_eos = True
        largest = min(largest, self._settings.max_num_seqs)
        table = measure_steps(self._llm, self._call_speculation, inputs, endless, largest)
        self.use_step_times(table)
        self.reset_prefix_cache()
        return table

    def use_step_times(self, table: StepTable) -> None:
        """Chooses the lengths of drafts by these step times."""
        if table[0]:
            self._call_speculation("use_step_times", *table)

    def read_lengths(self) -> LengthLog | None:
        """Steps since the last call by batch size and drafted tokens. None with a fixed length."""
        if not self._has_schedule:
            return None
        return LengthLog(**self._call_speculation("read_log"))

    @property
    def _has_schedule(self) -> bool:
        return self._settings.schedule != "fixed" and self._settings.speculative_config is not None

    def _call_speculation(self, method: str, *args: Any) -> Any:
        """Calls a method of ``scheduler.Speculation``."""
        return self._call_core("call_speculation", method, *args)

    def _call_core(self, method: str, *args: Any) -> Any:
        """Calls a method of vLLM's engine core, wherever that runs."""
        core: Any = self._llm.llm_engine.engine_core
        if self._has_own_process:
            return core.call_utility(method, *args)
        return getattr(core.engine_core, method)(*args)

    @property
    def _has_own_process(self) -> bool:
        """Whether vLLM's engine core runs in another process, which steps by itself."""
        return not hasattr(self._llm.llm_engine.engine_core, "engine_core")

    def _generation(self, completion: Any) -> Generation:
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request with {completion.finish_reason!r}")
        token_ids = list(completion.token_ids)
        # vLLM cuts the tokens, but not the log-probs, behind a text that ends the response.
        flat = completion.logprobs
        if flat.token_ids[: len(token_ids)] != token_ids:
            raise RuntimeError("vLLM's log-probs are not one for each sampled token")
        logprobs = flat.logprobs[: len(token_ids)]
        # A text that ends the response may cut the tokens of the last span.
        spans = [span for span in completion.weight_versions if span.start < len(token_ids)]
        first, *later = [(span.start, Versions.of_label(span.version)) for span in spans or completion.weight_versions]
        num_steps = tuple(span.num_steps for span in spans)
        reason, experts = completion.finish_reason, completion.routed_experts
        return Generation(token_ids, logprobs, reason, first[1], tuple(later), num_steps, experts)

    def propose(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[Proposals]:
        """A response to each prompt with the draft's proposals along it. Slow: one prompt after the other.

        A draft without a model (n-gram), or no draft, gives no blocks.

        Raises:
            ConfigError: an option of ``speculative_config`` hides the draft. An engine that only generates may have it.
        """
        require_visible_draft(self._settings.speculative_config)
        num_drafted = (self._settings.speculative_config or {}).get("num_speculative_tokens", 0)
        if num_drafted == 0:
            return [
                Proposals(prompt, group[0], [], [], [])
                for prompt, group in zip(prompts, self.generate(prompts, sampling, 1, seed), strict=True)
            ]
        self._llm.collective_rpc("start_recording_drafts")
        try:
            with self._longest_drafts():
                return [self._propose(prompt, sampling, seed, num_drafted) for prompt in prompts]
        finally:
            self._llm.collective_rpc("stop_recording_drafts")

    @contextmanager
    def _longest_drafts(self) -> Iterator[None]:
        """Drafts as many tokens as possible in every step, so that all recorded drafts have one length."""
        speculative = self._settings.speculative_config
        if speculative is None or not self._has_schedule:
            yield
            return
        self._call_speculation("pin_length", speculative["num_speculative_tokens"])
        try:
            yield
        finally:
            self._call_speculation("pin_length", None)

    def _propose(self, prompt: list[int], sampling: SamplingConfig, seed: int, num_drafted: int) -> Proposals:
        (generation,) = self.generate([prompt], sampling, 1, seed)[0]
        tokens, logprobs = self._llm.collective_rpc("take_recorded_drafts")[0]
        if len(tokens) % num_drafted:
            raise RuntimeError(f"vLLM's drafter proposed {len(tokens)} tokens, not a multiple of {num_drafted}")
        blocks = [tokens[start : start + num_drafted] for start in range(0, len(tokens), num_drafted)]
        anchors = drafted_anchors(len(prompt), generation.token_ids, blocks)
        return Proposals(
            prompt_ids=prompt,
            generation=generation,
            anchors=anchors,
            drafted=blocks[: len(anchors)],
            draft_logprobs=[logprobs[index * num_drafted :][:num_drafted] for index in range(len(anchors))],
        )

    def spec_counters(self) -> SpecCounters:
        """Counters of drafting since the engine started. All are 0 without a draft."""
        from vllm.v1.metrics.reader import Counter, Vector

        values: dict[str, Any] = {}
        for metric in self._llm.get_metrics():
            name = metric.name.removeprefix("vllm:spec_decode_")
            if name in _COUNTERS and isinstance(metric, Counter):
                values[name] = metric.value
            elif name in _COUNTERS and isinstance(metric, Vector):
                values[name] = tuple(metric.values)
        if self._has_schedule:
            values["num_drafts_per_pos"] = tuple(self._call_speculation("drafted_per_pos"))
        return SpecCounters(**values)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects to the trainer. ``init_info`` depends on the backend; it is ``{}`` for ``ray``."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self, draft: bool) -> None:
        """Begins an update of the draft's or the policy's weights."""
        self._sleep.require_weights()
        self._updated = "draft" if draft else "policy"
        if draft:
            self._llm.start_draft_weight_update()
        else:
            self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one chunk. The ``ray`` backend takes a payload of ``skyrl_spec.sync.payload.pack_weights``."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self) -> None:
        """Ends the update. The caller must then reset the prefix cache, which holds keys of the old weights."""
        self._llm.finish_weight_update()
        self._sleep.arrived(self._updated)

    def sleep(self, level: int) -> None:
        """Frees the GPU's memory. At level 1 the weights wait in host memory, at level 2 they are gone.

        Requests that run are an error of the caller: they would end without an answer.
        """
        self._sleep.falls_asleep(level)
        self._llm.sleep(level=level)

    def wake_weights(self) -> None:
        """Brings the weights back, or at level 2 memory for them, which a sync must fill."""
        self._sleep.wakes_weights()
        self._llm.wake_up(tags=["weights"])

    def wake_keys(self) -> None:
        """Makes room for keys. The engine can sample again."""
        self._sleep.wakes_keys()
        self._llm.wake_up(tags=["kv_cache"])

    def set_versions(self, versions: Versions) -> None:
        """Sets the versions of the weights that the engine holds. Every generation records them."""
        self._versions = versions
        self._llm.llm_engine.set_weight_version(versions.label)

    def reset_prefix_cache(self) -> None:
        """Drops all cached keys, including the draft's. Raises ``RuntimeError`` if vLLM still uses some."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        self.keys_are_old()

    def keys_are_old(self) -> None:
        """Notes that policy or draft changed, where running requests keep the keys that they have."""
        if self._has_schedule:
            self._call_speculation("weights_changed")

    def shutdown(self) -> None:
        """Frees the engine. It cannot be used afterwards."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
