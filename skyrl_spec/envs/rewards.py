"""Rewards: one episode of one turn in a skyrl-gym environment for every response."""

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
    """What an environment said of a response; ``error`` is why it could say nothing, and its reward is 0 then."""

    reward: float
    error: str | None = None


def failed(prompt: Prompt, error: str) -> EnvResult:
    """Of a response that could not be scored."""
    return EnvResult(0.0, f"row {prompt.uid}, env_class {prompt.env_class}: {error}")


def check_environments(prompts: Iterable[Prompt], environment: EnvironmentConfig) -> None:
    """Makes the environment of the first prompt of every env_class, to find what is missing before a run begins.

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
                f"({_one_line(error)}); it has {', '.join(prompt.extras) or 'none'}: mend the data"
            ) from error


def score(prompt: Prompt, text: str, env_config: Any) -> EnvResult:
    """Plays ``text`` as the only turn of an episode; the environment gets the row's fields as ``extras``.

    Raises:
        ConfigError: an environment that rewrites the prompt or wants another turn.
        RuntimeError: the environment raised, or its reward is no finite number.
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

    # Environments written for SkyRL read env_config by attribute.
    return skyrl_gym.make(prompt.env_class, env_config=OmegaConf.create(env_config), extras=dict(prompt.extras))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
