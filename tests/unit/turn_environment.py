"""An environment of several turns, in a module that processes import fast."""

from __future__ import annotations

import signal
from os import getpid, kill
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput


class CountingEnv(BaseTextEnv):
    """Answers a number with the sum of all numbers so far. Its reward is that sum, at the turn "done"."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.total, self.extras = 0, extras

    def step(self, action: str) -> BaseTextEnvStepOutput:
        if action == "raise":
            raise KeyError("no number")
        if action == "die":
            kill(getpid(), signal.SIGKILL)
        if action == "done":
            return BaseTextEnvStepOutput(observations=[], reward=self.total, done=True, metadata={})
        if action == "odd":
            odd: Any = [{"role": "user", "content": None}]
            return BaseTextEnvStepOutput(observations=odd, reward=0, done=False, metadata={})
        self.total += int(action)
        answer = [{"role": "user", "content": str(self.total)}]
        return BaseTextEnvStepOutput(observations=answer, reward=0, done=False, metadata={})

    def close(self) -> None:
        CLOSED.append(self.extras["name"])
        raise OSError("a connection that is gone")


CLOSED: list[str] = []
