"""What may import what: the heavy packages stay inside the layers that need them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import skyrl_spec

PACKAGE = Path(skyrl_spec.__file__).parent
HEAVY = ("torch", "vllm", "megatron", "ray")
# Top-level package to the places of skyrl_spec, as patterns, that may import it.
ALLOWED = {
    "megatron": ("megatron/*", "drafts/*", "checkpoint/*"),
    "vllm": ("rollout/*",),
    "ray": (
        "trainer/run.py",
        "trainer/placement.py",
        "trainer/actors.py",
        "*/actor.py",
        "evaluation/measure.py",
        "megatron/worker.py",
        "sync/weights.py",
        "rollout/sender.py",
    ),
}


def imported_packages(source: Path) -> Iterator[str]:
    """Top-level packages named by the import statements of ``source``, those inside functions included."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_layering(package: str) -> None:
    importers = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if package in imported_packages(path)]
    assert importers, f"nothing imports {package}: the test looks in the wrong place"
    outside = [str(path) for path in importers if not any(path.match(pattern) for pattern in ALLOWED[package])]
    assert outside == []


def test_configuration_loads_without_heavy_packages() -> None:
    """Package, command line, composition, rules and preflight, in a process of their own."""
    script = f"""
import sys
import skyrl_spec, skyrl_spec.cli, skyrl_spec.preflight
from skyrl_spec.compose import load_config
from skyrl_spec.validation import validate
validate(load_config(["experiment=cpu_mtp_grpo"]))
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
