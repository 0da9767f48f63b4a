"""What a check saw, and the table that the doctor prints."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from skyrl_spec.errors import ConfigError, RunError

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "not run"
_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """Result of a check. ``state`` is ok, warn, fail, or "not run" where the check does not apply."""

    check: str
    state: str
    # What was seen, with numbers.
    seen: str
    # What to do. Empty if nothing has to be done.
    fix: str = ""

    def lines(self) -> list[str]:
        """Lines for the terminal."""
        first = f"{self.state:<8}{self.check:<22}"
        text = self.seen + (f" -> {self.fix}" if self.fix else "")
        return textwrap.wrap(text, _WIDTH + len(first), initial_indent=first, subsequent_indent=" " * len(first))


def look(check: str, see: Callable[[], str]) -> Finding:
    """The finding of ``see``, which returns what it saw, or raises an error whose last part is what to do."""
    try:
        return Finding(check, OK, see())
    except (ConfigError, RunError) as error:
        problem, _, fix = " ".join(str(error).split()).rpartition("; ")
        return Finding(check, FAIL, problem or fix, fix if problem else "")


def skipped(check: str, why: str) -> Finding:
    """A check that does not apply."""
    return Finding(check, SKIPPED, why)


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Writes the findings as a list of JSON objects."""
    path.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")


def closing_line(findings: Sequence[Finding]) -> str:
    """Counts of all states."""
    states = [finding.state for finding in findings]
    return ", ".join(f"{states.count(state)} {state}" for state in (OK, WARN, FAIL, SKIPPED) if state in states)
