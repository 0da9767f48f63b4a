"""A response as it grows: turns of the policy, and between them answers of its environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, zip_longest
from typing import Any

from skyrl_spec.data.turns import TurnTemplate
from skyrl_spec.envs.episodes import EnvResult, Turn
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.derived import max_input_length
from skyrl_spec.settings.schema import Config, GeneratorConfig
from skyrl_spec.types import Generation, Message, Prompt, Rollout, Versions


@dataclass(eq=False)
class Conversation:
    """A prompt, and what followed. ``number``: of its episode, which no other has. ``place``: the engine's index."""

    number: int
    prompt: Prompt
    place: int = 0
    # Behind the prompt. Log-probs are 0 where the policy did not sample the token.
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    # Weights of the first token, and those that came later with the index of their first token.
    versions: Versions | None = None
    updates: list[tuple[int, Versions]] = field(default_factory=list)
    # Texts of the turns and of the answers behind them, and the last turn's tokens.
    texts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    last: Generation | None = None
    reward: float = 0.0
    error: str | None = None
    # Another turn may follow.
    is_open: bool = True
    # It ended because it was too long.
    is_cut: bool = False

    @property
    def input_ids(self) -> list[int]:
        """The prompt and everything behind it."""
        return [*self.prompt.token_ids, *self.token_ids]

    def add_turn(self, generation: Generation, text: str) -> None:
        self.last = generation
        self.texts.append(text)
        self._note_versions(generation)
        self._extend(generation.token_ids, generation.logprobs, is_sampled=True)

    def turn(self, max_turns: int) -> Turn:
        """The last turn, for the environment."""
        return Turn(self.number, self.prompt, tuple(self.texts), max_turns)

    def take(self, result: EnvResult, max_turns: int) -> None:
        """Takes in what the environment said to the last turn. A turn that was cut is the last one."""
        assert self.last is not None
        self.reward += result.reward
        self.is_cut = self.last.finish_reason != "stop"
        self.is_open = not (result.is_done or self.is_cut or len(self.texts) == max_turns)
        if result.error is not None:
            self.fail(result.error)

    def fail(self, error: str) -> None:
        """Ends here, without a reward."""
        self.reward, self.error, self.is_open = 0.0, error, False

    def go_on_with(self, answer: str, token_ids: list[int], max_input_length: int) -> None:
        """Appends the environment's answer, or ends here if the input of the next turn would be too long.

        ``token_ids``: everything between the last turn and the next.
        """
        self.is_cut = len(self.prompt.token_ids) + len(self.token_ids) + len(token_ids) > max_input_length
        self.is_open = not self.is_cut
        if self.is_open:
            self.answers.append(answer)
            self._extend(token_ids, [0.0] * len(token_ids), is_sampled=False)

    def rollout(self, generator: GeneratorConfig, text: str) -> Rollout:
        """The finished response. ``text``: that of all its tokens."""
        assert self.versions is not None
        assert self.last is not None
        is_trained_on = not (self.is_cut and generator.apply_overlong_filtering)
        return Rollout(
            self.prompt,
            Generation(
                self.token_ids,
                self.logprobs,
                "length" if self.is_cut else "stop",
                self.versions,
                tuple(self.updates),
                self.last.num_steps if len(self.texts) == 1 else (),
                # Its prompt has the turns before.
                self.last.experts,
            ),
            text,
            reward=0.0 if self.is_cut and generator.zero_reward_on_non_stop else self.reward,
            loss_mask=[int(is_trained_on and is_sampled) for is_sampled in self.is_sampled],
            error=self.error,
            turns=tuple(text for pair in zip_longest(self.texts, self.answers) for text in pair if text is not None),
        )

    def _note_versions(self, generation: Generation) -> None:
        first = len(self.token_ids)
        if self.versions is None:
            self.versions = generation.versions
        elif generation.versions != (self.updates[-1][1] if self.updates else self.versions):
            self.updates.append((first, generation.versions))
        self.updates += [(first + index, versions) for index, versions in generation.updates]

    def _extend(self, token_ids: list[int], logprobs: list[float], *, is_sampled: bool) -> None:
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.is_sampled += [is_sampled] * len(token_ids)


class Conversations:
    """Begins conversations, and takes in turns and what environments answer. It may serve several threads."""

    def __init__(self, config: Config, tokenizer: Any):
        generator = config.generator
        self._generator, self._max_input_length = generator, max_input_length(config)
        self._tokenizer = tokenizer
        self._template = TurnTemplate(tokenizer, generator.chat_template_kwargs) if generator.max_turns > 1 else None
        self._numbers = count(1)

    def begin(self, prompt: Prompt, place: int) -> Conversation:
        return Conversation(next(self._numbers), prompt, place)

    def add_turns(self, conversations: Sequence[Conversation], generations: Sequence[Generation]) -> list[Turn]:
        """Adds a sampled turn to each; returns these turns, for the environments."""
        texts = self._tokenizer.batch_decode([g.token_ids for g in generations], skip_special_tokens=True)
        for conversation, generation, text in zip(conversations, generations, texts, strict=True):
            conversation.add_turn(generation, text)
        return [conversation.turn(self._generator.max_turns) for conversation in conversations]

    def take(self, conversation: Conversation, result: EnvResult) -> None:
        """Takes in what an environment said to the last turn. The conversation is open if another turn follows."""
        conversation.take(result, self._generator.max_turns)
        if conversation.is_open:
            self._answer(conversation, result.observations)

    def rollout(self, conversation: Conversation) -> Rollout:
        """The finished response."""
        text = conversation.texts[0]
        if len(conversation.texts) > 1:
            text = self._tokenizer.decode(conversation.token_ids, skip_special_tokens=True)
        return conversation.rollout(self._generator, text)

    def _answer(self, conversation: Conversation, observations: Sequence[Message]) -> None:
        assert self._template is not None
        assert conversation.last is not None
        answer = "\n".join(message["content"] for message in observations)
        try:
            token_ids = self._template.between(conversation.last.token_ids, observations)
        except ConfigError as error:
            conversation.fail(f"row {conversation.prompt.uid}, turn {len(conversation.texts)}: {error}")
        else:
            conversation.go_on_with(answer, token_ids, self._max_input_length)
