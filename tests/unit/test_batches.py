"""Batches that are sampled in slices: what overlaps, and what an engine's loss costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from engines_by_hand import EngineByHand

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.requests import RunningRequests
from skyrl_spec.controller.rollouts import RolloutSampler
from skyrl_spec.errors import RunError
from skyrl_spec.rollout.seeds import prompt_seeds
from skyrl_spec.settings.schema import Config, EnvironmentConfig, SamplingConfig
from skyrl_spec.types import Generation, Prompt, SampleRequest

LONGEST_S = 60.0


class Tokenizer:
    """Text is the first token's number."""

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [str(one[0]) for one in ids]


@pytest.fixture
def sampler(tmp_path: Path, ray_cluster: None) -> Iterator[RolloutSampler]:
    """Two engines. Responses to prompts 3 and 4 end once the environment has scored those to 1 and 2."""
    awaited = {3: tmp_path / "1", 4: tmp_path / "2"}
    actors = [EngineByHand.remote(awaited) for _ in range(2)]
    environment = EnvironmentConfig(
        custom={"test_env_noting": "noting_environment:NotingEnv"},
        skyrl_gym={"test_env_noting": {"folder": str(tmp_path)}},
        max_failed_share=0.5,
    )
    config = replace(Config(), environment=environment)
    sampler = RolloutSampler(config, EngineGroup(actors, timeout_s=LONGEST_S), Tokenizer())
    yield sampler
    sampler.close()
    for actor in actors:
        ray.kill(actor)


def prompts(*numbers: int) -> list[Prompt]:
    return [Prompt(f"row-{number}", [number], [], "test_env_noting", {}) for number in numbers]


def test_responses_are_scored_while_others_are_sampled(sampler: RolloutSampler) -> None:
    # Without overlap, this waits for ever for the responses to 3 and 4.
    groups = sampler._sample(prompts(1, 2, 3, 4), SamplingConfig(), 2, seed=7)
    assert [[rollout.reward for rollout in group] for group in groups] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert [[rollout.generation.token_ids[0] for rollout in group] for group in groups] == [
        [1, 1],
        [2, 2],
        [3, 3],
        [4, 4],
    ]


def test_seeds_are_those_of_one_call_to_each_engine(sampler: RolloutSampler, tmp_path: Path) -> None:
    groups = sampler._sample(prompts(1, 2, 3), SamplingConfig(), 2, seed=7)
    seeds = [[rollout.generation.token_ids[1] for rollout in group] for group in groups]
    first, second = prompt_seeds(14, 2), prompt_seeds(15, 1)
    assert seeds == [[first[0], first[0] + 1], [second[0], second[0] + 1], [first[1], first[1] + 1]]


def test_too_many_failures_end_the_batch(sampler: RolloutSampler) -> None:
    # 0 raises.
    with pytest.raises(RunError, match=r"max_failed_share=0\.5: 3 of 4 responses could not be scored"):
        sampler._sample(prompts(0, 1, 0, 0), SamplingConfig(), 1, seed=7)


def lost_after_an_answer(tmp_path: Path, *, is_one_batch: bool) -> tuple[list[tuple[int, Generation]], list[int]]:
    """Answers when an engine answers request 0 and dies, and what its replacement was asked."""
    actors: list[Any] = [EngineByHand.remote({2: tmp_path / "there"}, dies=True)]

    def start(index: int) -> Any:
        (tmp_path / "there").touch()
        actors.append(EngineByHand.remote({}))
        return actors[-1]

    group = EngineGroup(actors[:1], LONGEST_S, start, max_restarts=1)
    group.allow_replacement(lambda engine: None)
    requests = RunningRequests(group, SamplingConfig(), is_one_batch=is_one_batch)
    for key, prompt in enumerate([[1], [2]]):
        requests.add(0, SampleRequest(key, prompt, seed=key))
    answers, begin = [], time.monotonic()
    while requests:
        answers += requests.poll(1.0)
        assert time.monotonic() - begin < LONGEST_S
    answers += requests.drain()
    asked = ray.get(actors[1].asked.remote())
    for actor in actors:
        ray.kill(actor)
    return answers, asked


@pytest.mark.parametrize("is_one_batch", [False, True])
def test_a_lost_engines_requests_are_asked_again_and_answered_once(
    tmp_path: Path, ray_cluster: None, is_one_batch: bool
) -> None:
    answers, asked = lost_after_an_answer(tmp_path, is_one_batch=is_one_batch)
    assert [key for key, _ in answers] == [0, 1]
    # A batch is asked as a whole, so that its responses are computed beside each other as before.
    assert asked == ([0, 1] if is_one_batch else [1])


def test_a_batch_of_an_engine_that_dies_is_asked_again_as_a_whole(sampler: RolloutSampler, tmp_path: Path) -> None:
    actors: list[Any] = [EngineByHand.remote({2: tmp_path / "there"}, dies=True)]

    def start(index: int) -> Any:
        (tmp_path / "there").touch()
        actors.append(EngineByHand.remote({}))
        return actors[-1]

    sampler._engines = EngineGroup(actors[:1], LONGEST_S, start, max_restarts=1)
    sampler._engines.allow_replacement(lambda engine: None)
    groups = sampler._sample(prompts(1, 2), SamplingConfig(), 1, seed=7)
    assert [group[0].reward for group in groups] == [1, 2]
    assert ray.get(actors[1].asked.remote()) == [0, 1]
    for actor in actors:
        ray.kill(actor)


def test_an_engine_that_answered_while_another_was_replaced_is_not_taken_for_silent(
    tmp_path: Path, ray_cluster: None
) -> None:
    awaited = dict.fromkeys((1, 2), tmp_path / "there")
    actors: list[Any] = [EngineByHand.remote(awaited, dies=True), EngineByHand.remote(awaited)]
    limit_s = 4.0

    def start(index: int) -> Any:
        # Longer than an engine may be silent.
        time.sleep(1.5 * limit_s)
        (tmp_path / "there").touch()
        actors.append(EngineByHand.remote({}))
        ray.get(actors[-1].asked.remote())
        return actors[-1]

    ray.get([actor.asked.remote() for actor in actors])
    group = EngineGroup(actors[:2], limit_s, start, max_restarts=1)
    group.allow_replacement(lambda engine: None)
    requests = RunningRequests(group, SamplingConfig(), is_one_batch=True)
    for key, prompt in enumerate([[1], [2]]):
        requests.add(key, SampleRequest(key, prompt, seed=key))
    answers, begin = [], time.monotonic()
    while requests:
        answers += requests.poll(1.0)
        assert time.monotonic() - begin < LONGEST_S
    requests.drain()
    assert sorted(key for key, _ in answers) == [0, 1]
    assert group.restarts == [1, 0]
    for actor in actors:
        ray.kill(actor)


def test_a_batch_adds_its_tokens_and_seconds(sampler: RolloutSampler) -> None:
    sampler._sample(prompts(1), SamplingConfig(), 1, seed=7)
    assert sampler.num_tokens == 2
    assert sampler.generate_s > 0
