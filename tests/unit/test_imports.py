"""The command line imports no heavy packages. ``make lint`` checks imports between our own packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet

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


def test_every_package_installs_on_the_first_python_of_this_version() -> None:
    """Machines have any patch release, such as Debian's 3.11.2. The lock was made on a later one."""
    first = f"{sys.version_info.major}.{sys.version_info.minor}.0"
    wanted = {found.metadata["Name"]: found.metadata["Requires-Python"] for found in distributions()}
    assert len(wanted) > 200
    assert {name: spec for name, spec in wanted.items() if spec and first not in SpecifierSet(spec)} == {}
