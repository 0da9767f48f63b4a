"""An environment that notes what it scored in files, in a module that processes import fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput


class NotingEnv(BaseTextEnv):
    """The reward is the number that the text is. Then a file of that name is there."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.folder = Path(env_config.folder)

    def step(self, action: str) -> BaseTextEnvStepOutput:
        if action == "0":
            raise KeyError("no score")
        (self.folder / action).touch()
        return BaseTextEnvStepOutput(observations=[], reward=int(action), done=True, metadata={})
