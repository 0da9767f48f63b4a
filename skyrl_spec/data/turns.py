"""Tokens between two turns of the policy: the end of its message, the environment's messages, the next one's beginning.

They are the difference that the chat template makes. What the policy sampled is never tokenized again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.types import Message

# Stands for any turn of the policy.
_TURN = "A-TURN-OF-THE-POLICY"
_PROBE: list[Message] = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _TURN}]


class TurnTemplate:
    """A chat template, asked for what follows a turn.

    Raises:
        ConfigError: the template changes or drops a turn once another message follows.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any]):
        self._tokenizer, self._kwargs = tokenizer, dict(template_kwargs)
        self._end = self._text(_PROBE, add_generation_prompt=False).partition(_TURN)[2]
        self.between([], [{"role": "user", "content": "2"}])

    def between(self, sampled: Sequence[int], observations: Sequence[Message]) -> list[int]:
        """Tokens behind the turn ``sampled``, up to where the next turn begins.

        An end token that was sampled is not repeated. Where a turn ended otherwise (``stop``), it follows.

        Raises:
            ConfigError: the template refuses the observations, or rewrites the turn because of them.
        """
        text = self._text([*_PROBE, *observations], add_generation_prompt=True)
        # What is in front of the turn is there already, as it was when the turn was sampled.
        _, is_there, behind = text.partition(_TURN)
        if not is_there or not behind.startswith(self._end):
            raise ConfigError(
                "generator.max_turns: the model's chat template rewrites earlier turns, so that a next turn cannot "
                "follow what was sampled; give the model another template, or set max_turns=1"
            )
        if sampled:
            behind = behind.removeprefix(self._tokenizer.decode([sampled[-1]], skip_special_tokens=False))
        return self._tokenizer.encode(behind, add_special_tokens=False)

    def _text(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._kwargs
            )
        # Whatever the template raises.
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise ConfigError(f"generator.max_turns: the model's chat template refuses a turn ({reason})") from None
