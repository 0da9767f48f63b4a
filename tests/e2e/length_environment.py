"""An environment that rewards every other length of a response, whatever it says."""

from __future__ import annotations

from skyrl_gym.envs.base_text_env import BaseTextEnvStepOutput
from skyrl_gym.envs.gsm8k.env import GSM8kEnv


class LengthEnv(GSM8kEnv):
    def step(self, action: str) -> BaseTextEnvStepOutput:
        return BaseTextEnvStepOutput(observations=[], reward=float(len(action) % 2), done=True, metadata={})
