"""Servers that a run starts for its environments."""

from __future__ import annotations

import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from skyrl_spec.envs.tool_servers import running_servers
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.compose import load_config


@pytest.fixture
def entry() -> dict[str, str]:
    """A real server of files, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "command": f"python -m http.server {port} --bind 127.0.0.1",
        "url": f"http://127.0.0.1:{port}/",
    }


def answers(entry: dict[str, str]) -> bool:
    try:
        with urllib.request.urlopen(entry["url"], timeout=5):
            return True
    except OSError:
        return False


def begin(entry: dict[str, str], run_dir: Path) -> None:
    with running_servers({"files": entry}, run_dir):
        raise AssertionError("it has begun")


def test_a_server_answers_while_the_run_goes_on_and_ends_with_it(entry: dict[str, str], tmp_path: Path) -> None:
    with running_servers({"files": entry}, tmp_path) as servers:
        assert answers(entry)
        servers[0].require_running()
        assert "GET /" in (tmp_path / "servers" / "files.log").read_text()
    assert not answers(entry)


def test_one_that_answers_already_is_used_and_stays(
    entry: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running_servers({"files": entry}, tmp_path):
        with running_servers({"files": entry}, tmp_path) as servers:
            assert servers == []
        assert answers(entry)
    assert f"environment.servers.files: {entry['url']} answers already; nothing is started" in capfd.readouterr().err


def test_a_server_that_ends_is_one_line(entry: dict[str, str], tmp_path: Path) -> None:
    words = {"command": f"{sys.executable} -c 'print(1); raise SystemExit(3)'", "url": entry["url"]}
    with pytest.raises(RunError, match=r"^environment.servers.files: ended with status 3; .*files.log has what it"):
        begin(words, tmp_path)
    with running_servers({"files": entry}, tmp_path) as servers:
        servers[0].process.kill()
        servers[0].process.wait()
        with pytest.raises(RunError, match=r"ended with status -9"):
            servers[0].require_running()


def test_an_error_inside_ends_it_too(entry: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), running_servers({"files": entry}, tmp_path):
        raise ZeroDivisionError
    time.sleep(0.1)
    assert not answers(entry)


def test_a_command_that_does_not_exist(entry: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^environment.servers.files.command=no-such-program: No such file"):
        begin(entry | {"command": "no-such-program"}, tmp_path)


@pytest.mark.parametrize("wrong", ["{url: x}", "{command: x, url: 3}", "text", "{command: '', url: x}"])
def test_bad_entries_are_refused_before_anything_starts(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"^environment.servers.search=.*must have a command and a url"):
        validate(load_config(["experiment=cpu_mtp_grpo", f"environment.servers.search={wrong}"]))
