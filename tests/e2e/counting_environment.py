"""An environment of two turns: it asks for the sum, says how long the answer was, and asks again."""

from __future__ import annotations

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnvStepOutput
from skyrl_gym.envs.gsm8k.env import GSM8kEnv

# Characters that the examples' tokenizers have.
ANSWER = "{}letters,again:"


class TwiceEnv(GSM8kEnv):
    """Half of the reward in each turn. Rows with an odd index are over after the first."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__(env_config, extras or {})
        self.num_left = 1 if (extras or {})["extra_info"]["index"] % 2 else 2

    def step(self, action: str) -> BaseTextEnvStepOutput:
        output = super().step(action)
        self.num_left -= 1
        answer = [{"role": "user", "content": ANSWER.format(len(action))}] if self.num_left else []
        return BaseTextEnvStepOutput(
            observations=answer, reward=output["reward"] / 2, done=self.num_left == 0, metadata={}
        )
