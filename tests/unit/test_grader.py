"""Reward functions that raise, hang or die in the scoring process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from skyrl_spec.envs.episodes import EnvResult, Turn
from skyrl_spec.envs.grader import Grader
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.settings.schema import EnvironmentConfig
from skyrl_spec.types import Prompt

TIMEOUT_S = 1.0
ENVIRONMENT = EnvironmentConfig(
    custom={"test_env_moody": f"{__name__}:MoodyEnv"},
    skyrl_gym={"test_env_moody": {"scale": 0.5}},
    timeout_s=TIMEOUT_S,
    max_failed_share=1.0,
)
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
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "alarm":
            # As graders that limit their own time do. In another thread this raises an error.
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            signal.pause()
        reward = float("nan") if action == "nan" else self.scale * len(action)
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=action != "again", metadata={})


def prompts(num: int) -> list[Prompt]:
    return [
        Prompt(f"row-{index}", [1], [{"role": "user", "content": "1+1="}], "test_env_moody", {}) for index in range(num)
    ]


def score_all(grader: Grader, texts: list[str]) -> list[EnvResult]:
    """Results of responses of one turn."""
    pairs = zip(prompts(len(texts)), texts, strict=True)
    return grader.play_all([Turn(number, prompt, (text,), 1) for number, (prompt, text) in enumerate(pairs)])


@pytest.fixture
def grader() -> Iterator[Grader]:
    made = Grader(ENVIRONMENT)
    yield made
    made.close()


def test_a_response_that_cannot_be_scored_costs_no_other_one(grader: Grader) -> None:
    texts = ["abcd", "raise", "ab", "hang", "die", "nan", "alarm", "abcdef"]
    results = score_all(grader, texts)
    assert [result.reward for result in results] == [2.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.5, 3.0]
    errors = {index: result.error for index, result in enumerate(results) if result.error is not None}
    where = {index: f"row row-{index}, env_class test_env_moody: " for index in errors}
    assert errors == {
        1: where[1] + "KeyError: 'no grade'",
        3: where[3] + "took longer than environment.timeout_s=1",
        4: where[4] + "the process that scored it died",
        5: where[5] + "reward is nan",
    }
    assert [result.reward for result in score_all(grader, ["ab", ""])] == [1.0, 0.0]


def test_what_an_environment_started_ends_with_it(grader: Grader) -> None:
    assert score_all(grader, ["hang with a child"])[0].error is not None
    processes = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", CHILD_SLEEPS]]
    # Signals take a moment.
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_failures_beyond_the_allowed_share_end_the_run() -> None:
    grader = Grader(replace(ENVIRONMENT, max_failed_share=0.25))
    texts = ["raise", "ab"] * 2 + ["ab"] * 4
    assert sum(result.error is not None for result in score_all(grader, texts)) == 2
    # It does not wait for all eight.
    with pytest.raises(RunError, match=r"^environment\.max_failed_share=0\.25: 3 of 8 .* last one in row row-2, "):
        score_all(grader, ["hang"] * 8)
    grader.close()


def test_an_environment_that_is_of_no_use_ends_the_run(grader: Grader) -> None:
    with pytest.raises(ConfigError, match=r"^environment\.env_class=test_env_moody: wants another turn \(row row-1\)"):
        score_all(grader, ["ab", "again"])


def test_signals_of_the_terminal_do_not_reach_it(grader: Grader) -> None:
    score_all(grader, ["ab"])
    (process,) = scoring(psutil.Process())
    for signum in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(signum)
    assert score_all(grader, ["ab"])[0].error is None
    grader.close()
    assert not process.is_running()


def test_it_ends_with_a_parent_that_is_killed_while_it_hangs(tmp_path: Path) -> None:
    script = tmp_path / "scores.py"
    script.write_text(
        "from dataclasses import replace\n"
        "from test_grader import ENVIRONMENT, score_all\n"
        "from skyrl_spec.envs.grader import Grader\n"
        "if __name__ == '__main__':\n"
        "    score_all(Grader(replace(ENVIRONMENT, timeout_s=600)), ['hang'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    deadline = time.monotonic() + 120
    with subprocess.Popen([sys.executable, script], env=environment) as parent:
        try:
            children: list[psutil.Process] = []
            # The process is busy once it hangs.
            while not children or children[0].cpu_times().user < 5:
                assert parent.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
                children = scoring(psutil.Process(parent.pid))
        finally:
            parent.kill()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone
    assert not alive


def scoring(parent: psutil.Process) -> list[psutil.Process]:
    return [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
