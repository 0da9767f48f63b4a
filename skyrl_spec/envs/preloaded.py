"""What the server that forks processes for environments imports, so that each of them starts in milliseconds.

Only that server imports this module. It leaves the terminal's process group: signals that schedulers and terminals send
to the group would end the server, and its processes end with it. It ends with the run.
"""

from __future__ import annotations

import os
import signal

import skyrl_gym  # noqa: F401

from skyrl_spec.envs.env_process import end_with_parent

os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_parent()
