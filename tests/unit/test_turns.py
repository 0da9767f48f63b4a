"""Responses of several turns: tokens between turns, environments that go on, and what is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skyrl_gym.envs.base_text_env import BaseTextEnv
from transformers import AutoTokenizer
from turn_environment import CLOSED

from skyrl_spec.controller.conversation import Conversation
from skyrl_spec.data.packing import build_train_batch
from skyrl_spec.data.turns import TurnTemplate
from skyrl_spec.drafts.align import chain_mask
from skyrl_spec.drafts.blocks import draw_anchors, is_anchor, supervised_blocks
from skyrl_spec.envs.episodes import EnvResult, Episodes, Turn, check_environments
from skyrl_spec.envs.grader import Grader
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.settings.schema import EnvironmentConfig, GeneratorConfig
from skyrl_spec.training.step import build_micro
from skyrl_spec.types import Generation, Prompt, Versions

MODEL = Path(__file__).parents[2] / "examples" / "arithmetic_mtp" / "model"
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>;' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Drops what an earlier turn thought, and earlier turns altogether.
REWRITES = {
    "thoughts": CHATML.replace(
        "m.content +", "(m.content if m is sameas messages[-1] or m.role == 'user' else 'thought') +"
    ),
    "turns": CHATML.replace("in messages", "in messages[-1:]"),
}
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12).map(str.strip).filter(bool)


@pytest.fixture(scope="module", params=["own", "chatml"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if request.param == "chatml":
        tokenizer.chat_template = CHATML
    return tokenizer


@settings(deadline=None, max_examples=200)
@given(turns=st.lists(TEXTS, min_size=2, max_size=5), question=TEXTS, answers=st.lists(TEXTS, min_size=5, max_size=5))
def test_transcripts_are_the_conversations_of_the_template(
    tokenizer: Any, turns: list[str], question: str, answers: list[str]
) -> None:
    template, messages = TurnTemplate(tokenizer, {}), [{"role": "user", "content": question}]
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for index, (turn, answer) in enumerate(zip(turns, answers, strict=False)):
        sampled = [*tokenizer.encode(turn, add_special_tokens=False), tokenizer.eos_token_id]
        token_ids = [*token_ids, *sampled]
        observation = {"role": "user", "content": answer}
        messages += [{"role": "assistant", "content": turn}, observation]
        token_ids += template.between(sampled, [observation])
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert token_ids == whole, index


def test_a_turn_that_ended_at_a_text_is_closed(tokenizer: Any) -> None:
    template, observation = TurnTemplate(tokenizer, {}), {"role": "user", "content": "b"}
    sampled = tokenizer.encode("a</search>", add_special_tokens=False)
    text = tokenizer.decode(template.between(sampled, [observation]), skip_special_tokens=False)
    is_chatml = tokenizer.chat_template == CHATML
    assert text == ("<|end|>;<|user|>b<|end|>;<|assistant|>" if is_chatml else "<|end|><|user|>b<|assistant|>")


@pytest.mark.parametrize("kind", REWRITES)
def test_a_template_that_rewrites_earlier_turns_is_refused(kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = REWRITES[kind]
    with pytest.raises(ConfigError, match=r"^generator\.max_turns: the model's chat template rewrites earlier turns"):
        TurnTemplate(tokenizer, {})


def test_a_template_that_shows_the_thoughts_of_the_last_turn_only() -> None:
    """As Qwen3's does. What is in front of a turn is not asked for again."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = CHATML.replace(
        "m.content +", "('thoughts' if loop.last and m.role == 'assistant' else '') + m.content +"
    )
    between = TurnTemplate(tokenizer, {}).between([], [{"role": "user", "content": "b"}])
    assert tokenizer.decode(between) == "<|end|>;<|user|>b<|end|>;<|assistant|>"


def test_a_template_that_refuses_a_role_is_named(tokenizer: Any) -> None:
    template = TurnTemplate(tokenizer, {})
    tokenizer.chat_template, kept = "{{ raise_exception('no tools here') }}", tokenizer.chat_template
    with pytest.raises(ConfigError, match=r"^generator\.max_turns: .* refuses a turn \(no tools here\)"):
        template.between([], [{"role": "tool", "content": "x"}])
    tokenizer.chat_template = kept


GROUND_TRUTH = {"method": "rule", "ground_truth": "2"}
ENVIRONMENT = EnvironmentConfig(custom={"test_env_counting": "turn_environment:CountingEnv"}, max_failed_share=1.0)


def turn(episode: int, *texts: str, max_turns: int = 4) -> Turn:
    name = f"row-{episode}"
    return Turn(episode, Prompt(name, [1], [], "test_env_counting", {"name": name}), texts, max_turns)


@pytest.fixture
def grader() -> Iterator[Grader]:
    made = Grader(ENVIRONMENT)
    yield made
    made.close()


def answers(results: list[EnvResult]) -> list[Any]:
    return [
        result.error or (result.reward if result.is_done else result.observations[0]["content"]) for result in results
    ]


def test_environments_go_on_from_turn_to_turn(grader: Grader) -> None:
    assert answers(grader.play_all([turn(1, "5"), turn(2, "7")])) == ["5", "7"]
    assert answers(grader.play_all([turn(1, "5", "1"), turn(2, "7", "done")])) == ["6", 7.0]
    assert answers(grader.play_all([turn(1, "5", "1", "done")])) == [6.0]


def test_an_environment_that_was_lost_plays_its_turns_again(grader: Grader) -> None:
    grader.play_all([turn(1, "5"), turn(2, "7"), turn(3, "9")])
    results = answers(grader.play_all([turn(1, "5", "1"), turn(2, "7", "die"), turn(3, "9", "1")]))
    assert results == ["6", "row row-2, env_class test_env_counting, turn 2: the process that scored it died", "10"]
    assert answers(grader.play_all([turn(3, "9", "1", "done"), turn(1, "5", "1", "done")])) == [10.0, 6.0]


def test_what_an_environment_raises_in_its_second_turn_costs_one_response(grader: Grader) -> None:
    grader.play_all([turn(1, "5"), turn(2, "7"), turn(3, "1")])
    first, second, third = answers(grader.play_all([turn(1, "5", "raise"), turn(2, "7", "2"), turn(3, "1", "odd")]))
    assert first == "row row-1, env_class test_env_counting, turn 2: KeyError: 'no number'"
    assert second == "9"
    assert re.search(r"turn 2: TypeError: an observation must have a role and a content of type str", third)


def test_failures_are_counted_over_all_turns_of_a_batch(grader: Grader) -> None:
    grader._environment = replace(ENVIRONMENT, max_failed_share=0.1)
    grader.play_all([turn(1, "5"), turn(2, "7")])
    # One of the two that go on, of a batch of twenty.
    results = grader.results([grader.submit(turn(1, "5", "raise")), grader.submit(turn(2, "7", "1"))], [], 20)
    assert [result.error is None for result in results] == [False, True]
    with pytest.raises(RunError, match=r"^environment\.max_failed_share=0\.1: 3 of 20 responses could not be scored"):
        grader.results([grader.submit(turn(2, "7", "1", "raise"))], ["a", "b"], 20)


def test_after_a_batch_environments_are_made_anew(grader: Grader) -> None:
    grader.play_all([turn(1, "5")])
    grader.end_episodes([1])
    # Another would say 6.
    assert answers(grader.play_all([turn(1, "1")])) == ["1"]


def test_environments_of_skyrl_gym_know_how_many_turns_there_are() -> None:
    row = Prompt("a", [1], [{"role": "user", "content": "1+1="}], "gsm8k_multi_turn", {"reward_spec": GROUND_TRUTH})
    check_environments([row], EnvironmentConfig(), max_turns=3)
    episodes = Episodes()
    results = [episodes.play(Turn(1, row, tuple(["#### 3"] * number), max_turns=3), {}) for number in (1, 2, 3)]
    assert [result.is_done for result in results] == [False, False, True]
    assert all(result.observations for result in results[:2])


def test_an_answer_that_nobody_reads_may_be_left_out() -> None:
    class BriefEnv(BaseTextEnv):
        def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
            super().__init__()

        def step(self, action: str) -> Any:
            return {"reward": 1.0, "done": True}

    import skyrl_gym

    skyrl_gym.register("test_env_brief", BriefEnv)
    prompt = Prompt("a", [1], [], "test_env_brief", {})
    assert Episodes().play(Turn(1, prompt, ("x",), max_turns=1), {}) == EnvResult(1.0)


def test_environments_are_closed_once_they_are_not_needed() -> None:
    from skyrl_spec.envs.registry import register_custom

    register_custom(ENVIRONMENT.custom)
    CLOSED.clear()
    episodes = Episodes()
    for one in (turn(1, "5"), turn(2, "6"), turn(3, "7"), turn(4, "8", max_turns=2)):
        episodes.play(one, {})
    assert CLOSED == []
    episodes.play(turn(4, "8", "9", max_turns=2), {})
    assert CLOSED == ["row-4"]
    episodes.play(turn(1, "5", "done"), {})
    assert CLOSED == ["row-4", "row-1"]
    episodes.end([3])
    assert CLOSED == ["row-4", "row-1", "row-3"]
    with pytest.raises(RuntimeError, match="KeyError"):
        episodes.play(turn(2, "6", "raise"), {})
    assert CLOSED == ["row-4", "row-1", "row-3", "row-2"]


def generation(token_ids: list[int], finish_reason: str = "stop") -> Generation:
    return Generation(token_ids, [-1.0 - token / 8 for token in token_ids], finish_reason, Versions(2, 1))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Conversation, list[bool]]:
    """A conversation of random turns, and which of its tokens the policy sampled."""
    tokens = st.lists(st.integers(1, 90), min_size=1, max_size=7)
    conversation, sampled = Conversation(0, Prompt("a", draw(tokens), [], "", {})), []
    num_turns = draw(st.integers(1, 4))
    for index in range(num_turns):
        turn_ids = draw(tokens)
        conversation.add_turn(generation(turn_ids, draw(st.sampled_from(["stop", "stop", "length"]))), "text")
        sampled += [True] * len(turn_ids)
        conversation.take(EnvResult(draw(st.sampled_from([0.0, 0.5])), is_done=index == num_turns - 1), max_turns=4)
        if not conversation.is_open:
            break
        answer = draw(st.lists(st.integers(91, 99), max_size=5))
        conversation.go_on_with("answer", answer, max_input_length=draw(st.sampled_from([10, 1000])))
        if not conversation.is_open:
            break
        sampled += [False] * len(answer)
    return conversation, sampled


@settings(deadline=None, max_examples=1000)
@given(st.lists(conversations(), min_size=1, max_size=4))
def test_no_token_of_an_environment_is_trained_on_and_every_sampled_one_is(
    some: list[tuple[Conversation, list[bool]]],
) -> None:
    rollouts = [conversation.rollout(GeneratorConfig(), "") for conversation, _ in some]
    batch = build_train_batch(
        rollouts, [1.0] * len(rollouts), pad_token_id=0, loss_reduction="token_mean", max_response_length=8
    )
    is_sampled_BS = np.zeros(batch.token_ids.shape, bool)
    for row, (conversation, sampled) in enumerate(some):
        begin = len(conversation.prompt.token_ids)
        is_sampled_BS[row, begin : begin + len(sampled)] = sampled
        assert batch.lengths[row] == begin + len(sampled)
        assert conversation.input_ids == batch.token_ids[row, : batch.lengths[row]].tolist()
    # The policy's loss, and the log-probs that it is corrected with.
    assert np.array_equal(batch.loss_weights > 0, is_sampled_BS)
    expected = np.where(is_sampled_BS, -1.0 - batch.token_ids / 8, 0.0)
    np.testing.assert_allclose(batch.rollout_logprobs, expected)
    # The draft's: every drafted token, and all before it in its draft, were sampled in one turn.
    pack = build_micro(batch, np.arange(len(batch))).pack
    is_sampled_T = is_sampled_BS[np.arange(batch.token_ids.shape[1]) < batch.lengths[:, None]]
    for depth, mask_T in enumerate(chain_mask(pack.loss_mask_T, pack.segment_ids_T, 3), start=1):
        for target in np.flatnonzero(mask_T).tolist():
            assert is_sampled_T[target - depth + 1 : target + 2].all()
    anchors = draw_anchors(pack, [[row] for row in range(len(batch))], [1000] * len(batch))
    assert len(anchors) == is_anchor(is_sampled_BS).sum()
    blocks = supervised_blocks(anchors, pack, 3).supervised_AK if anchors else []
    for anchor, supervised in zip(anchors, blocks, strict=True):
        for slot in supervised.nonzero().flatten().tolist():
            assert is_sampled_T[anchor : anchor + slot + 2].all()


def test_rewards_add_up_and_a_failure_takes_them_away() -> None:
    conversation = Conversation(0, Prompt("a", [1], [], "", {}))
    conversation.add_turn(generation([2, 3]), "x")
    conversation.take(EnvResult(0.25, is_done=False), max_turns=3)
    conversation.go_on_with("well?", [4], max_input_length=100)
    conversation.add_turn(generation([5]), "y")
    assert conversation.turn(3).texts == ("x", "y")
    conversation.take(EnvResult(0.5), max_turns=3)
    rollout = conversation.rollout(GeneratorConfig(), "xy")
    assert (rollout.reward, rollout.num_turns, rollout.error) == (0.75, 2, None)
    assert rollout.turns == ("x", "well?", "y")
    assert (rollout.loss_mask, rollout.generation.token_ids) == ([1, 1, 0, 1], [2, 3, 4, 5])
    conversation.take(EnvResult(0.0, error="it broke"), max_turns=3)
    failed = conversation.rollout(GeneratorConfig(), "xy")
    assert (failed.reward, failed.error) == (0.0, "it broke")


def test_a_response_that_outgrows_its_input_was_cut() -> None:
    conversation = Conversation(0, Prompt("a", [1, 2], [], "", {}))
    conversation.add_turn(generation([3, 4]), "x")
    conversation.take(EnvResult(0.5, is_done=False), max_turns=3)
    conversation.go_on_with("?", [5, 6], max_input_length=5)
    rollout = conversation.rollout(GeneratorConfig(), "x")
    assert (rollout.generation.finish_reason, rollout.turns, rollout.loss_mask) == ("length", ("x",), [1, 1])
    kept = Conversation(0, Prompt("a", [1, 2], [], "", {}))
    kept.add_turn(generation([3, 4]), "x")
    kept.take(EnvResult(0.5, is_done=False), max_turns=3)
    kept.go_on_with("?", [5, 6], max_input_length=6)
    assert kept.is_open


def test_a_turn_that_was_cut_is_the_last_one() -> None:
    conversation = Conversation(0, Prompt("a", [1], [], "", {}))
    conversation.add_turn(generation([2], "length"), "x")
    conversation.take(EnvResult(1.0, is_done=False), max_turns=3)
    assert not conversation.is_open
    filtering = GeneratorConfig(apply_overlong_filtering=True, zero_reward_on_non_stop=True)
    rollout = conversation.rollout(filtering, "x")
    assert (rollout.loss_mask, rollout.reward) == ([0], 0.0)
