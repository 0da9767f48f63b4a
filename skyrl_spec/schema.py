"""What the dataclasses that are schemas say of their fields: names, types, defaults, and the comments above them."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A field; ``name`` is dotted below a section, ``comment`` one paragraph, ``default`` as in YAML."""

    name: str
    type_name: str
    default: str
    comment: str


@dataclass(frozen=True)
class Section:
    """A dataclass within a schema; ``name`` is empty for the schema itself."""

    name: str
    docstring: str
    settings: list[Setting]


def describe(schema: type, defaults: Any = None) -> list[Setting]:
    """The fields of ``schema`` that are no sections, in the order of the source; ``defaults`` is one of it."""
    comments, hints = _comments(schema), typing.get_type_hints(schema)
    defaults = defaults or schema()
    return [
        Setting(item.name, _type_name(item.type), _shown(getattr(defaults, item.name)), comments.get(item.name, ""))
        for item in fields(schema)
        if not is_dataclass(hints[item.name])
    ]


def sections(schema: type, name: str = "", defaults: Any = None) -> Iterator[Section]:
    """``schema`` and the sections below it, each before its own; names of settings are dotted.

    A section may have other defaults where it is used than its class says.
    """
    prefix, defaults = f"{name}." if name else "", defaults or schema()
    own = [Setting(prefix + s.name, s.type_name, s.default, s.comment) for s in describe(schema, defaults)]
    yield Section(name, _docstring(schema), own)
    for item, hint in typing.get_type_hints(schema).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from sections(hint, prefix + item, getattr(defaults, item))


def _docstring(schema: type) -> str:
    # A dataclass without one gets its signature.
    text = inspect.getdoc(schema) or ""
    return "" if text.startswith(f"{schema.__name__}(") else " ".join(text.split())


def _comments(schema: type) -> dict[str, str]:
    """The lines of comment right above each field, joined; null in place of None, as people type it."""
    source = textwrap.dedent(inspect.getsource(schema))
    lines, (node,) = source.splitlines(), ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        first = item.lineno - 1
        above = first
        while above > 0 and lines[above - 1].strip().startswith("#"):
            above -= 1
        comment = " ".join(line.strip().lstrip("# ") for line in lines[above:first])
        found[item.target.id] = re.sub(r"\bNone\b", "null", comment)
    return found


def _type_name(annotation: Any) -> str:
    return str(annotation).replace(" | None", " or null")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"
