"""The list of mutants fits the code: every break can still be made, and changes what the code does."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutant import Mutant
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def code(source: str) -> str:
    """The syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_break_changes_the_code(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert code(mutant.broken(source)) != code(source)
    for test in mutant.tests:
        file, *function = test.split("[")[0].split("::")
        assert all(f"def {name}(" in (ROOT / file).read_text() for name in function), test


def test_names_are_unique_and_there_are_enough() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
    assert len(MUTANTS) > 30


def test_a_break_that_is_gone_fails() -> None:
    mutant = Mutant("gone", "file.py", "a = 1", "a = 2", ())
    assert mutant.broken("a = 1\n") == "a = 2\n"
    for source in ("", "a = 1; a = 1"):
        with pytest.raises(ValueError, match=f"mutant 'gone': file.py has 'a = 1' {source.count('a')} times, not once"):
            mutant.broken(source)
