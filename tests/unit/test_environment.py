"""RAY_ADDRESS, servers, proxies and TMPDIR: what does not serve is said within seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.environment import check_cluster, check_server, cluster_address, use_short_tmpdir


@contextmanager
def server(reply: bytes | None) -> Iterator[str]:
    """An address where something answers ``reply``. None: it accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                if reply is not None:
                    connection.sendall(reply)
                done.wait(20)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        done.set()
        thread.join()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def refused(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check_cluster()
    assert time.monotonic() - start < 10
    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: ")
    return str(caught.value)


def test_an_address_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused(monkeypatch, f"127.0.0.1:{unused_port()}")
    assert "no Ray cluster answers there (Connection refused); start the cluster (ray start --head), or unset" in line


@pytest.mark.parametrize("address", ["no-such-host.invalid:6379", "127.0.0.1:70000"])
def test_an_address_that_cannot_be(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no Ray cluster answers there" in refused(monkeypatch, address)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "http://head:8265", "a b:1"])
def test_an_address_of_another_form(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "must be HOST:PORT, auto or local" in refused(monkeypatch, address)


def test_ray_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Ray Client is not supported; give HOST:PORT" in refused(monkeypatch, "ray://head:10001")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 mail ready\r\n", b"x", None])
def test_something_else_that_answers(reply: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(reply) as address:
        line = refused(monkeypatch, address)
    assert "no Ray cluster answers there (timed out)" in line if reply is None else "is not a Ray cluster" in line


def test_a_cluster_of_ray_is_accepted(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    check_cluster()
    assert cluster_address() == ray.get_runtime_context().gcs_address


@pytest.mark.parametrize("address", ["", "local", None])
def test_without_an_address_a_run_has_its_own_ray(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    check_cluster()
    assert cluster_address() is None


def unreachable(url: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_server(url, "trainer.logger=[wandb]", "set WANDB_MODE=offline")
    return str(caught.value)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{port}", "https://no-such-host.invalid", "http://127.0.0.1:99999"]
)
def test_a_server_that_does_not_answer(address: str, no_proxies: None) -> None:
    url = address.format(port=unused_port())
    line = unreachable(url)
    assert line.startswith(f"trainer.logger=[wandb]: {url}: no server answers there (")
    assert line.endswith("); set WANDB_MODE=offline")


@pytest.mark.parametrize("form", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://user:word@127.0.0.1:{port}/"])
def test_a_proxy_that_does_not_answer(form: str, no_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    port = unused_port()
    proxy = form.format(port=port)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with server(None) as address:
        assert f": https_proxy=127.0.0.1:{port}: no server answers" in unreachable(f"https://{address}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        check_server(f"https://{address}", "trainer.logger=[wandb]", "")


def test_a_proxy_is_asked_for_a_server_that_only_it_reaches(no_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(None) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy}")
        check_server("https://no-such-host.invalid", "trainer.logger=[wandb]", "")


@pytest.mark.parametrize("length", [20, 28, 29, 84, 200])
def test_a_long_tmpdir_is_replaced(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "/tmp/" + "x" * (length - 5)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.setenv("TMPDIR", folder)
    use_short_tmpdir()
    is_long = length > 28
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == ("/tmp" if is_long else folder)
    assert ("is too long for sockets" in capsys.readouterr().err) == is_long


RAY_IN_A_LONG_TMPDIR = """
from skyrl_spec.controller.placement import ray_session
import ray
with ray_session(verbose=False):
    print(ray.get(ray.remote(lambda: 7).remote()))
"""


SLOW_RAY = """
import os, sys
from pathlib import Path
import ray
from skyrl_spec.controller.placement import ray_session
from skyrl_spec.errors import RunError

start, late = ray.init, int(sys.argv[1])
is_only_once = late == 1

def init(*args, **options):
    global late
    if is_only_once:
        start(*args, **options)
    late -= 1
    if late >= 0:
        raise Exception("The current node timed out during startup.")

def servers():
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if parent(path) == os.getpid()]
    return sorted(name for name in names if name in ("gcs_server", "raylet"))

def parent(path):
    return int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])

ray.init = init
try:
    with ray_session(verbose=False):
        print(servers(), ray.get(ray.remote(lambda: 7).remote()))
except RunError as error:
    print(error)
print(servers())
"""


@pytest.mark.parametrize("num_late", [1, 3])
def test_ray_is_started_again_if_its_servers_are_slow(num_late: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW_RAY, str(num_late)], capture_output=True, text=True, timeout=300, check=False
    )
    first, last = done.stdout.splitlines()
    if num_late == 1:
        assert first == "['gcs_server', 'raylet'] 7", done.stderr
    else:
        assert first.startswith("Ray's servers did not start in 3 tries of half a minute; ")
    assert last == "[]"
    assert done.stderr.count("did not start in time; trying again") == min(num_late, 2)


def test_ray_starts_with_a_long_tmpdir(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 84)
    folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", RAY_IN_A_LONG_TMPDIR],
        env=kept | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert done.stderr.startswith(f"skyrl-spec: TMPDIR={folder} is too long for sockets")
