"""An environment with faults, in a module that processes import fast."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

# Argument of sleep, by which the test finds the process.
CHILD_SLEEPS = "86417"


class MoodyEnv(BaseTextEnv):
    """The reward is the length of the text, unless the text names a fault."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.scale = env_config.scale

    def step(self, action: str) -> BaseTextEnvStepOutput:
        if action == "raise":
            raise KeyError("no grade")
        if action == "hang":
            # Hangs in C, and no other thread can run.
            re.match(r"(a+)+$", "a" * 60 + "b")
        if action == "hang with a child":
            subprocess.run(["sleep", CHILD_SLEEPS], check=True)
        if action == "sleep":
            time.sleep(600)
        if action == "length from environment":
            action = "a" * int(os.environ["SKYRL_TEST_LENGTH"])
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "alarm":
            # As graders that limit their own time do. In another thread this raises an error.
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            signal.pause()
        reward = float("nan") if action == "nan" else self.scale * len(action)
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=action != "again", metadata={})
