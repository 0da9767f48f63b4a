"""The report of a run of the GPU pack: the machine, a table of the checks, their details, and pictures."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

_PACKAGES = ("torch", "triton", "megatron-core", "transformers")


def describe_machine(device: torch.device) -> dict[str, str]:
    """Card, date and versions. Uses no CUDA, which this process must not."""
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "card": _card(device)}
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found | {"cuda": str(torch.version.cuda)}


@cache
def _card(device: torch.device) -> str:
    if device.type == "cpu":
        return "none: the checks ran in small on a CPU"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def write_report(written: dict[str, Any], path: Path) -> None:
    """Writes ``written``, the content of result.json, as Markdown."""
    machine, checks = written["machine"], written["checks"]
    lines = ["# GPU pack", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| check | what it measures | figure | limit | state | s |", "|---|---|---:|---:|---|---:|"]
    lines += [f"| {' | '.join(_cells(check))} |" for check in checks]
    for check in checks:
        if check["details"] or check["state"] == "not ok":
            lines += ["", f"## {check['name']}", "", *_details(check["details"])]
            if check["why"]:
                lines += ["", "```", check["why"], "```"]
    path.write_text("\n".join(lines) + "\n")


def _cells(check: dict[str, Any]) -> list[str]:
    value = "" if check["value"] is None else f"{check['value']:.3g} {check['unit']}"
    limit = "" if check["limit"] is None else f"{'≥' if check['at_least'] else '≤'} {check['limit']:g}"
    state = check["state"] + (f" {check['why']}" if check["state"] in ("waits", "not run") else "")
    return [check["name"], check["what"], value, limit, state, f"{check['seconds']:.0f}"]


def _details(details: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in details.items():
        if isinstance(value, dict):
            lines += [f"{indent}- {name}:", *_details(value, indent + "    ")]
        else:
            lines.append(f"{indent}- {name}: {_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_pictures(written: dict[str, Any], folder: Path) -> None:
    """Draws what was measured: ``draft_loss.png`` and ``training_steps.png``."""
    details = {check["name"]: check["details"] for check in written["checks"] if check["details"]}
    if "loss memory" in details:
        versions = details["loss memory"]["versions"]
        bars = {unit: {name: figures[unit] for name, figures in versions.items()} for unit in ("GiB", "s")}
        _draw(bars, "Draft loss and gradient: peak memory and time", folder / "draft_loss.png")
    steps = {name: of_step["measured"] for name, of_step in details.items() if name.startswith("training step")}
    if steps:
        columns = ("tokens/s", "draft share")
        bars = {column: {_model(name): step[column] for name, step in steps.items()} for column in columns}
        _draw(bars, "Training step", folder / "training_steps.png")


def _model(name: str) -> str:
    return name.removeprefix("training step ")


def _draw(bars: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """A panel of labelled bars for each unit."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.suptitle(title)
    for axes, (unit, values) in zip(figure.subplots(1, len(bars)), bars.items(), strict=True):
        drawn = axes.barh(list(values), list(values.values()))
        axes.bar_label(drawn, fmt="%.3g", padding=3)
        axes.set_xlabel(unit)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
