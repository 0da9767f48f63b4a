"""Fails where a file of the package has more than 450 lines, or a function more than 60 (``make lint``)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
ROOT = Path(__file__).parents[1]


def too_long(path: Path) -> Iterator[str]:
    """One line for the file, and for each function of it, that is too long."""
    source = path.read_text()
    where, num_lines = path.relative_to(ROOT), source.count("\n")
    if num_lines > MAX_FILE_LINES:
        yield f"{where}: {num_lines} lines, at most {MAX_FILE_LINES}: split it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{where}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION_LINES}: split it"


def main() -> int:
    lines = [line for path in sorted((ROOT / "skyrl_spec").rglob("*.py")) for line in too_long(path)]
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
