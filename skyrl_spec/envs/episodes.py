"""Episodes: the turns of a response, played in a skyrl-gym environment."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from skyrl_spec.envs.registry import check_env_class
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.schema import EnvironmentConfig
from skyrl_spec.types import Message, Prompt


@dataclass(frozen=True)
class Turn:
    """A turn to play. The environment gets the row's fields as ``extras``."""

    # Number of the episode, which no other has.
    episode: int
    prompt: Prompt
    # Texts of all turns of the episode, the new one last.
    texts: tuple[str, ...]
    # Most turns of an episode.
    max_turns: int


@dataclass(frozen=True)
class EnvResult:
    """An environment's answer to a turn. ``error`` says why it failed: no reward, and the episode is over."""

    reward: float
    is_done: bool = True
    observations: tuple[Message, ...] = ()
    error: str | None = None


def failed(turn: Turn, error: str) -> EnvResult:
    """Result for a turn that could not be played."""
    which = f", turn {len(turn.texts)}" if turn.max_turns > 1 else ""
    return EnvResult(0.0, error=f"row {turn.prompt.uid}, env_class {turn.prompt.env_class}{which}: {error}")


def check_environments(prompts: Iterable[Prompt], environment: EnvironmentConfig, max_turns: int = 1) -> None:
    """Makes one environment of every env_class, for its first prompt, to find mistakes before a run begins.

    Raises:
        ConfigError: an env_class that does not exist, or an environment that cannot be made from the row's fields.
    """
    first_of = {prompt.env_class: prompt for prompt in reversed(list(prompts))}
    for env_class, prompt in first_of.items():
        check_env_class(env_class, environment.custom, setting=f"env_class of row {prompt.uid}")
        try:
            _make(prompt, environment.skyrl_gym.get(env_class, {}), max_turns).close()
        except Exception as error:
            raise ConfigError(
                f"row {prompt.uid}: environment {env_class} cannot be made from its fields "
                f"({_one_line(error)}); it has {', '.join(prompt.extras) or 'none'}: fix the data"
            ) from error


class Episodes:
    """Environments of episodes that go on, by number. All belong to one process."""

    def __init__(self) -> None:
        # With the number of turns that were played.
        self._live: dict[int, tuple[Any, int]] = {}

    def end(self, episodes: Iterable[int]) -> None:
        """Closes the environments of these episodes."""
        for episode in episodes:
            self._close(self._live.pop(episode)[0])

    def play(self, turn: Turn, env_config: Any) -> EnvResult:
        """Plays the last text of ``turn``. An environment that was lost with its process plays all turns again.

        Raises:
            ConfigError: the environment rewrites the prompt, or wants another turn where there is one only.
            RuntimeError: the environment raised an exception, or its answer has another form.
        """
        env, num_played = self._live.pop(turn.episode, (None, 0))
        try:
            if env is None or num_played != len(turn.texts) - 1:
                env = _begin(turn, env_config)
            output = env.step(turn.texts[-1])
            reward, is_done = float(output["reward"]), bool(output["done"])
            observations = () if is_done else tuple(_message(item) for item in output.get("observations") or ())
        except ConfigError:
            raise
        except Exception as error:
            self._close(env)
            raise RuntimeError(_one_line(error)) from error
        if not math.isfinite(reward):
            self._close(env)
            raise RuntimeError(f"reward is {reward}")
        if not is_done and turn.max_turns == 1:
            raise ConfigError(
                f"environment.env_class={turn.prompt.env_class}: wants another turn (row {turn.prompt.uid}); raise "
                "generator.max_turns, or use a single-turn environment such as gsm8k"
            )
        if is_done or len(turn.texts) == turn.max_turns:
            self._close(env)
        else:
            self._live[turn.episode] = env, len(turn.texts)
        return EnvResult(reward, is_done, observations)

    def _close(self, env: Any) -> None:
        # What it says at its end matters to nobody.
        with suppress(Exception):
            env.close()


def _begin(turn: Turn, env_config: Any) -> Any:
    """A new environment that has played all turns but the last."""
    prompt = turn.prompt
    env = _make(prompt, env_config, turn.max_turns)
    messages, _ = env.init([dict(message) for message in prompt.messages])
    if messages != prompt.messages:
        raise ConfigError(
            f"environment.env_class={prompt.env_class}: rewrites the prompt (row {prompt.uid}), which is not supported "
            "yet; put the whole prompt into the dataset"
        )
    for text in turn.texts[:-1]:
        env.step(text)
    return env


def _message(message: Any) -> Message:
    """A message of an environment. Raises TypeError if it is none."""
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError(f"an observation must have a role and a content of type str, but is {message!r:.100}")
    return {"role": role, "content": content}


def _make(prompt: Prompt, env_config: Any, max_turns: int) -> Any:
    import skyrl_gym

    # skyrl-gym's environments end by themselves after so many turns, as SkyRL tells them. An environment that wants
    # several where there is one is told nothing, so that it says so.
    extras = dict(prompt.extras) | ({"max_turns": max_turns} if max_turns > 1 else {})
    # A DictConfig, because environments written for SkyRL read env_config by attribute.
    return skyrl_gym.make(prompt.env_class, env_config=OmegaConf.create(env_config), extras=extras)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
