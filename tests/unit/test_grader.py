"""Reward functions that raise, hang or die in the scoring process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from scored_environment import CHILD_SLEEPS

from skyrl_spec.envs import grader as grader_module
from skyrl_spec.envs.episodes import EnvResult, Turn
from skyrl_spec.envs.grader import Grader
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.settings.schema import EnvironmentConfig
from skyrl_spec.types import Prompt

TIMEOUT_S = 1.0
ENVIRONMENT = EnvironmentConfig(
    custom={"test_env_moody": "scored_environment:MoodyEnv"},
    skyrl_gym={"test_env_moody": {"scale": 0.5}},
    timeout_s=TIMEOUT_S,
    max_failed_share=1.0,
)


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
    with pytest.raises(RunError, match=r"^environment\.max_failed_share=0\.25: 3 of 8 .* last one in row row-\d, "):
        score_all(grader, ["hang"] * 8)
    grader.close()


def test_responses_that_hang_delay_the_others_by_nothing_and_the_batch_by_one_time_limit() -> None:
    """One in a hundred of 2,048 hangs. Fewer processes than that would take several time limits."""
    limit_s = 12.0
    grader = Grader(replace(ENVIRONMENT, timeout_s=limit_s))
    score_all(grader, ["ab"])
    start = time.monotonic()
    ends: dict[int, float] = {}
    for number, prompt in enumerate(prompts(2048)):
        text = "sleep" if number % 100 == 50 else "abcd"
        future = grader.submit(Turn(number, prompt, (text,), 1))
        future.add_done_callback(lambda _, number=number: ends.setdefault(number, time.monotonic() - start))
    while len(ends) < 2048:
        assert time.monotonic() < start + 3 * limit_s
        time.sleep(0.1)
    grader.close()
    sleepers = [ends[number] for number in range(50, 2048, 100)]
    others = [end for number, end in ends.items() if number % 100 != 50]
    assert len(sleepers) == 20
    assert max(others) < limit_s <= min(sleepers)
    assert max(sleepers) < 2 * limit_s


def test_the_end_of_the_pool_ends_what_waits_for_it(grader: Grader) -> None:
    futures = [grader.submit(Turn(number, prompt, ("sleep",), 1)) for number, prompt in enumerate(prompts(40))]
    while not futures[0].running():
        time.sleep(0.01)
    grader.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RunError, match="the run ends while responses are scored"):
        futures[0].result()
    with pytest.raises(RunError, match="the run ends while responses are scored"):
        score_all(grader, ["ab"])


def test_a_machine_without_room_for_processes_fails_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_environment: EnvironmentConfig) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    # In place of a machine that has no process left.
    monkeypatch.setattr(grader_module, "EnvProcess", no_room)
    made = Grader(ENVIRONMENT)
    for _ in range(2):
        with pytest.raises(RunError, match=r"no process for environments can be started .*Resource temporarily"):
            score_all(made, ["ab", "abc"])
    made.close()


def test_a_process_that_cannot_start_fails_what_waits() -> None:
    grader = Grader(replace(ENVIRONMENT, custom={"test_env_moody": "no_such_module:Env"}))
    with pytest.raises(ConfigError, match=r"^environment\.custom: cannot be imported in the scoring process"):
        score_all(grader, ["ab", "abc"])
    grader.close()


def test_a_further_process_that_cannot_start_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "late"
    (tmp_path / "late_environment.py").write_text(
        "import pathlib\nfrom scored_environment import MoodyEnv\n"
        f"assert not pathlib.Path({str(flag)!r}).exists(), 'late'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    grader = Grader(replace(ENVIRONMENT, custom={"test_env_moody": "late_environment:MoodyEnv"}))
    assert score_all(grader, ["ab"])[0].reward == 1.0
    flag.touch()
    # Long enough for others to begin.
    assert [result.reward for result in score_all(grader, ["alarm"] * 200)] == [2.5] * 200
    grader.close()


def test_environments_see_the_variables_of_the_run(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their processes are forked by a server that started earlier."""
    score_all(grader, ["ab"])
    monkeypatch.setenv("SKYRL_TEST_LENGTH", "7")
    other = Grader(ENVIRONMENT)
    assert [result.reward for result in score_all(other, ["length from environment"])] == [3.5]
    other.close()


def test_an_environment_that_is_of_no_use_ends_the_run(grader: Grader) -> None:
    with pytest.raises(ConfigError, match=r"^environment\.env_class=test_env_moody: wants another turn \(row row-1\)"):
        score_all(grader, ["ab", "again"])


def play_through_signals() -> None:
    """Signals that a terminal sends reach neither the server that forks nor a process that plays."""
    grader = Grader(ENVIRONMENT)
    score_all(grader, ["ab"])
    server, (process,) = scoring(psutil.Process())
    assert server is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        server.send_signal(signum)
        process.send_signal(signum)
    assert score_all(grader, ["ab"])[0].error is None
    assert scoring(psutil.Process()) == (server, [process])
    # A terminal's signals go to the group.
    assert {os.getpgid(one.pid) for one in (server, process)} == {server.pid, process.pid}
    grader.close()
    assert not process.is_running()


def command(folder: Path, statement: str) -> tuple[list[str | Path], dict[str, str]]:
    """Command and variables of a Python process that runs a statement. It has a server of its own."""
    script = folder / "script.py"
    script.write_text(f"import test_grader\nif __name__ == '__main__':\n    test_grader.{statement}\n")
    return [sys.executable, script], os.environ | {"PYTHONPATH": str(Path(__file__).parent)}


def test_signals_of_the_terminal_do_not_reach_it(tmp_path: Path) -> None:
    argv, environment = command(tmp_path, "play_through_signals()")
    subprocess.run(argv, env=environment, check=True, timeout=120)


def hang_for_ten_minutes() -> None:
    score_all(Grader(replace(ENVIRONMENT, timeout_s=600)), ["hang"])


def test_it_ends_with_a_parent_that_is_killed_while_it_hangs(tmp_path: Path) -> None:
    argv, environment = command(tmp_path, "hang_for_ten_minutes()")
    deadline = time.monotonic() + 120
    with subprocess.Popen(argv, env=environment) as parent:
        try:
            children: list[psutil.Process] = []
            # The process is busy once it hangs.
            while not children or children[0].cpu_times().user < 5:
                assert parent.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
                _, children = scoring(psutil.Process(parent.pid))
        finally:
            parent.kill()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone
    assert not alive


def scoring(parent: psutil.Process) -> tuple[psutil.Process | None, list[psutil.Process]]:
    """The server that forks, and the processes that play."""
    servers = [child for child in parent.children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    return (servers[0], servers[0].children()) if servers else (None, [])
