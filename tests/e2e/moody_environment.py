"""An environment that raises on one row, and hangs once on another."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnvStepOutput
from skyrl_gym.envs.gsm8k.env import GSM8kEnv

RAISES_ON, HANGS_ON = 1, 2
# Environment variable with the path of a file, which exists once the environment has hung.
HUNG = "MOODY_ENVIRONMENT_HUNG"


class MoodyEnv(GSM8kEnv):
    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__(env_config, extras or {})
        self.index = (extras or {})["extra_info"]["index"]

    def step(self, action: str) -> BaseTextEnvStepOutput:
        if self.index == RAISES_ON:
            raise ZeroDivisionError("by nothing")
        hung = Path(os.environ[HUNG])
        if self.index == HANGS_ON and not hung.exists():
            hung.touch()
            time.sleep(10_000)
        return super().step(action)


class SlowEnv(GSM8kEnv):
    """Takes long once the file of this environment variable exists."""

    VARIABLE = "SLOW_ENVIRONMENT_IS_SLOW"

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__(env_config, extras or {})

    def step(self, action: str) -> BaseTextEnvStepOutput:
        if Path(os.environ[self.VARIABLE]).exists():
            time.sleep(50)
        return super().step(action)
