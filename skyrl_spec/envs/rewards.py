"""Rewards: each response is the only turn of an episode in a skyrl-gym environment."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from skyrl_spec.envs.registry import check_env_class
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.schema import EnvironmentConfig
from skyrl_spec.types import Prompt


@dataclass(frozen=True)
class EnvResult:
    """Reward of a response. ``error`` says why it could not be scored; the reward is then 0."""

    reward: float
    error: str | None = None


def failed(prompt: Prompt, error: str) -> EnvResult:
    """Result for a response that could not be scored."""
    return EnvResult(0.0, f"row {prompt.uid}, env_class {prompt.env_class}: {error}")


def check_environments(prompts: Iterable[Prompt], environment: EnvironmentConfig) -> None:
    """Makes one environment of every env_class, for its first prompt, to find mistakes before a run begins.

    Raises:
        ConfigError: an env_class that does not exist, or an environment that cannot be made from the row's fields.
    """
    first_of = {prompt.env_class: prompt for prompt in reversed(list(prompts))}
    for env_class, prompt in first_of.items():
        check_env_class(env_class, environment.custom, setting=f"env_class of row {prompt.uid}")
        try:
            _make(prompt, environment.skyrl_gym.get(env_class, {})).close()
        except Exception as error:
            raise ConfigError(
                f"row {prompt.uid}: environment {env_class} cannot be made from its fields "
                f"({_one_line(error)}); it has {', '.join(prompt.extras) or 'none'}: fix the data"
            ) from error


def score(prompt: Prompt, text: str, env_config: Any) -> EnvResult:
    """Plays ``text`` as the only turn of an episode. The environment gets the row's fields as ``extras``.

    Raises:
        ConfigError: the environment rewrites the prompt or wants another turn.
        RuntimeError: the environment raised an exception, or its reward is not finite.
    """
    try:
        env = _make(prompt, env_config)
        messages, _ = env.init([dict(message) for message in prompt.messages])
        output = env.step(text)
        env.close()
        reward, is_done = float(output["reward"]), bool(output["done"])
    except Exception as error:
        raise RuntimeError(_one_line(error)) from error
    if messages != prompt.messages:
        raise ConfigError(
            f"environment.env_class={prompt.env_class}: rewrites the prompt (row {prompt.uid}), which is not supported "
            "yet; put the whole prompt into the dataset"
        )
    if not is_done:
        raise ConfigError(
            f"environment.env_class={prompt.env_class}: wants another turn (row {prompt.uid}), multi-turn environments "
            "are not supported yet; use a single-turn one such as gsm8k"
        )
    if not math.isfinite(reward):
        raise RuntimeError(f"reward is {reward}")
    return EnvResult(reward)


def _make(prompt: Prompt, env_config: Any) -> Any:
    import skyrl_gym

    # A DictConfig, because environments written for SkyRL read env_config by attribute.
    return skyrl_gym.make(prompt.env_class, env_config=OmegaConf.create(env_config), extras=dict(prompt.extras))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
