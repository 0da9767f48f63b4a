"""An environment that notes every turn it plays, and can ask for a second one."""

from __future__ import annotations

import os
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnvStepOutput
from skyrl_gym.envs.gsm8k.env import GSM8kEnv

# Environment variable with the path of the notes: a line with the row's index for each turn.
NOTES = "LOGGING_ENVIRONMENT_NOTES"
ANSWER = "again:"


class NotedEnv(GSM8kEnv):
    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__(env_config, extras or {})
        self.info = (extras or {})["extra_info"]
        self.num_left = self.info["turns"]

    def step(self, action: str) -> BaseTextEnvStepOutput:
        # Short lines are appended as a whole.
        with open(os.environ[NOTES], "a") as notes:
            notes.write(f"{self.info['index']}\n")
        output = super().step(action)
        self.num_left -= 1
        answer = [{"role": "user", "content": ANSWER}] if self.num_left else []
        return BaseTextEnvStepOutput(observations=answer, reward=output["reward"], done=self.num_left == 0, metadata={})
