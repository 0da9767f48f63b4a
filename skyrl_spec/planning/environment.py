"""What a run takes from the environment: addresses of a Ray cluster and of proxies, the folder for temporary files."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from skyrl_spec.errors import ConfigError

_PATIENCE_S = 5.0
# What a client of HTTP/2, and so of gRPC, sends first: its preface and empty settings. A server answers with its own.
_HELLO, _SETTINGS_FRAME = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", 4
# Of a socket's path. Ray puts session_DATE_TIME_PID/sockets/plasma_store below a folder of ours.
_MAX_SOCKET_PATH, _BELOW_TMPDIR = (
    107,
    len("/skyrl-12345678/session_2026-01-01_00-00-00_123456_1234567/sockets/plasma_store"),
)


def cluster_address() -> str | None:
    """Address of the Ray cluster to join. None: the run starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def check_cluster() -> None:
    """Checks that a server of Ray answers at ``RAY_ADDRESS``. Ray itself would try for minutes.

    Raises:
        ConfigError: the address has another form, or no such server answers.
    """
    address = cluster_address()
    # Ray looks for a cluster on this machine, which takes no time.
    if address is None or address == "auto":
        return
    where, fix = f"RAY_ADDRESS={address}", "start the cluster (ray start --head), or unset RAY_ADDRESS"
    if address.startswith("ray://"):
        raise ConfigError(f"{where}: Ray Client is not supported; give HOST:PORT, on a machine of the cluster")
    found = re.fullmatch(r"\[?([^\s/\]]+)\]?:(\d{1,5})", address)
    if found is None:
        raise ConfigError(f"{where}: must be HOST:PORT, auto or local; {fix}")
    try:
        with socket.create_connection((found[1], int(found[2])), timeout=_PATIENCE_S) as connection:
            connection.sendall(_HELLO)
            reply = connection.recv(16)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where}: no Ray cluster answers there ({reason}); {fix}") from None
    if len(reply) < 4 or reply[3] != _SETTINGS_FRAME:
        raise ConfigError(f"{where}: what answers there is not a Ray cluster; {fix}")


def check_server(url: str, user: str, fix: str) -> None:
    """Checks that something accepts connections at ``url``, or at the proxy that the environment names for it.

    ``user``: setting or part that needs the server, for the error. ``fix``: what to do without it.

    Raises:
        ConfigError: nothing does, or the address cannot be one.
    """
    scheme, host = urlsplit(url).scheme, urlsplit(url).netloc.rpartition("@")[2]
    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    if proxy is not None and "/" in getproxies().get("no", ""):
        # Networks, which other programs read. Whether they bypass the proxy is not known here.
        return
    # A proxy may be given without a scheme.
    asked = urlsplit(url if proxy is None else proxy if "//" in proxy else f"//{proxy}")
    # Without a password.
    where = url if proxy is None else f"{scheme}_proxy={asked.netloc.rpartition('@')[2]}"
    try:
        port = asked.port or (443 if asked.scheme == "https" else 80)
        socket.create_connection((asked.hostname or "", port), timeout=_PATIENCE_S).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{user}: {where}: no server answers there ({reason}); {fix}") from None


def use_short_tmpdir() -> None:
    """Makes /tmp the folder for temporary files, of child processes too, if the paths of sockets would get too long.

    Raises:
        ConfigError: they would, and /tmp cannot be written to.
    """
    folder, limit = tempfile.gettempdir(), _MAX_SOCKET_PATH - _BELOW_TMPDIR
    if len(os.fsencode(folder)) <= limit:
        return
    if not os.access("/tmp", os.W_OK):
        raise ConfigError(
            f"TMPDIR={folder}: must have at most {limit} characters, because paths of sockets are limited; set a "
            "shorter one"
        )
    print(f"skyrl-spec: TMPDIR={folder} is too long for sockets; temporary files are in /tmp", file=sys.stderr)
    tempfile.tempdir = os.environ["TMPDIR"] = "/tmp"
