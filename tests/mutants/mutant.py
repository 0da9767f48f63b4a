"""A mutant: one break of one line, and the tests that catch it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``before`` occurs exactly once in ``file``, and one of ``tests`` fails with ``after`` in its place."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def broken(self, source: str) -> str:
        """The source of ``file`` with the break.

        Raises:
            ValueError: ``before`` is not there, or more than once: the code has changed, so must this entry.
        """
        count = source.count(self.before)
        if count != 1:
            raise ValueError(f"mutant {self.name!r}: {self.file} has {self.before!r} {count} times, not once")
        return source.replace(self.before, self.after)

    def matches(self, words: Sequence[str]) -> bool:
        """Whether the name or the file has one of ``words``; without words, yes."""
        return not words or any(word in self.name or word in self.file for word in words)


def of(file: str, tests: Sequence[str], *breaks: tuple[str, str, str]) -> list[Mutant]:
    """Mutants of one file that the same tests catch: name, before, after."""
    return [Mutant(name, f"skyrl_spec/{file}", before, after, tuple(tests)) for name, before, after in breaks]
