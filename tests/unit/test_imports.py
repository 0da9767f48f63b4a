"""The command line imports no heavy packages. ``make lint`` checks imports between our own packages."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "vllm", "megatron", "ray")


def test_configuration_loads_without_heavy_packages() -> None:
    """Command line, composition, rules, preflight and plan, in a separate process."""
    script = f"""
import sys
import skyrl_spec, skyrl_spec.cli, skyrl_spec.planning.preflight
from skyrl_spec.settings.compose import load_config
from skyrl_spec.planning.validation import validate
validate(load_config(["experiment=cpu_mtp_grpo"]))
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
