"""Writes docs/reference/ from the code: settings, commands and metrics.

``--check`` writes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from skyrl_spec.cli import RUNS, SCHEMAS, TOOLS
from skyrl_spec.metrics.reference import REFERENCE
from skyrl_spec.settings.describe import Setting, describe, sections
from skyrl_spec.settings.schema import Config

DIRECTORY = Path(__file__).parents[1] / "docs" / "reference"
USAGES = dict.fromkeys(RUNS, "experiment=NAME [KEY=VALUE ...]") | {
    "compare": "experiment=NAME [arms=[ARM,...]] [seeds=N] [KEY=VALUE ...]",
    "doctor": "[target=RUN|DIR|MODEL] [draft=DIR] [experiment=NAME] [KEY=VALUE ...]",
    "eval-draft": "target=RUN|DIR|MODEL [KEY=VALUE ...]",
    "layouts": "experiment=NAME gpus=N [KEY=VALUE ...]",
    "report": "RUN [RUN ...] [out=DIR]",
    "export": "checkpoint=RUN|DIR out=DIR [KEY=VALUE ...]",
}
GENERATED = "<!-- Made by scripts/reference.py from the code; change it there. -->\n"


def settings() -> str:
    """The page of settings of ``train``, ``warmup-draft`` and ``compare``."""
    parts = [
        GENERATED,
        "# Settings\n",
        "Settings of `skyrl-spec train`, `warmup-draft` and `compare`. Give them as `KEY=VALUE` words or in a YAML "
        "file in `configs/experiment/`. Names follow SkyRL if SkyRL has the setting. `null` means that the value "
        "follows from other settings. `configs/` has ready-made configurations. `--cfg job` prints all settings of a "
        "run.\n",
    ]
    for section in sections(Config):
        if not section.settings:
            continue
        parts.append(f"## {section.name}\n")
        if section.docstring:
            parts.append(f"{section.docstring.replace('``', '`')}\n")
        parts.append(_table(section.settings, section.name))
    return "\n".join(parts)


def commands() -> str:
    """The page of commands and their options."""
    parts = [
        GENERATED,
        "# Commands\n",
        "All commands take `-h` (help) and `-v` (show the output of workers, engines and libraries).\n",
    ]
    for name, (_, description) in (RUNS | TOOLS).items():
        parts.append(f"## skyrl-spec {name}\n\n```\nskyrl-spec {name} {USAGES[name]}\n```\n\n{description}\n")
        if name in RUNS:
            parts.append("Takes [settings](settings.md). `--cfg job` prints all of them with their values.\n")
        if name in SCHEMAS:
            parts.append(_table(describe(SCHEMAS[name]), ""))
    return "\n".join(parts)


def metrics() -> str:
    """The page of metrics."""
    parts = [
        GENERATED,
        "# Metrics\n",
        "Keys of `RUN/metrics.jsonl` (one object per step), wandb and TensorBoard. `N` is the number of samples per "
        "prompt, `K` a draft position, counted from 1. A run has only the keys that apply to it: without a draft there "
        "is no `draft/*`. `headline/*` are the keys of `RUN/summary.json` and of the summary in wandb.\n",
    ]
    group = ""
    for entry in REFERENCE:
        if (first := entry.key.split("/")[0]) != group:
            group = first
            parts.append(f"\n## {group}\n\n| key | unit | meaning |\n|---|---|---|")
        parts.append(f"| `{entry.key}` | {entry.unit} | {_cell(entry.meaning)} |")
    return "\n".join(parts) + "\n"


def _table(settings: Sequence[Setting], section: str) -> str:
    lines = ["| setting | default | type, allowed | meaning |", "|---|---|---|---|"]
    for setting in settings:
        name = setting.name.removeprefix(f"{section}.")
        lines.append(
            f"| `{name}` | `{setting.default}` | {_allowed(setting)} | {_cell(setting.doc)} |",
        )
    return "\n".join(lines) + "\n"


def _allowed(setting: Setting) -> str:
    allowed = setting.type_name
    if setting.allowed is not None:
        allowed += f": {setting.allowed_text}"
    return _cell(allowed)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages = {"settings.md": settings(), "commands.md": commands(), "metrics.md": metrics()}
    stale = [name for name, text in pages.items() if _read(DIRECTORY / name) != text]
    if check:
        for name in stale:
            print(f"docs/reference/{name}: is out of date; run scripts/reference.py", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (DIRECTORY / name).write_text(pages[name])
    return 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
