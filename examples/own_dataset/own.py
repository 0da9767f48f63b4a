"""Rows of your own and a reward of your own: how close an answer comes."""

import json
import random
import sys
from pathlib import Path
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput


class Closeness(BaseTextEnv):
    """1 for the right number after ``####``, less the further away it is; 0 without a number."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None):
        super().__init__()
        self.truth = int((extras or {})["reward_spec"]["ground_truth"])

    def step(self, action: str) -> BaseTextEnvStepOutput:
        answer = action.rpartition("####")[2].strip()
        is_number = answer.removeprefix("-").isdecimal()
        reward = 1 / (1 + abs(int(answer) - self.truth)) if is_number else 0.0
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})


def row(rng: random.Random) -> dict[str, Any]:
    terms = [rng.randint(1, 9) for _ in range(rng.randint(4, 6))]
    question = "+".join(map(str, terms)) + "="
    return {
        "prompt": [{"role": "user", "content": question}],
        "env_class": "closeness",
        "reward_spec": {"ground_truth": str(sum(terms))},
    }


if __name__ == "__main__":
    rng = random.Random(0)
    for name, num_rows in (("train", 1024), ("validation", 64)):
        lines = [json.dumps(row(rng)) + "\n" for _ in range(num_rows)]
        Path(sys.argv[1], f"{name}.jsonl").write_text("".join(lines))
