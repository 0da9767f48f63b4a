"""Names, types, defaults and documentation of settings, read from the dataclasses that declare them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from skyrl_spec.settings.allowed import Allowed, Range


@dataclass(frozen=True)
class Setting:
    """A setting. ``name`` is dotted if it is in a section; ``default`` is written as in YAML."""

    name: str
    type_name: str
    default: str
    doc: str
    allowed: Allowed

    @property
    def allowed_text(self) -> str:
        """Allowed values in words. Empty if the type decides alone."""
        if self.allowed is None:
            return ""
        return str(self.allowed) if isinstance(self.allowed, Range) else ", ".join(self.allowed)


@dataclass(frozen=True)
class Section:
    """A dataclass inside a schema, with its settings. ``name`` is empty for the schema itself."""

    name: str
    docstring: str
    settings: list[Setting]


def describe(schema: type, defaults: Any = None) -> list[Setting]:
    """Settings declared directly in ``schema``, in order. Defaults are those of the instance ``defaults``."""
    hints = typing.get_type_hints(schema)
    defaults = defaults or schema()
    return [
        Setting(
            item.name,
            _type_name(item.type),
            _shown(getattr(defaults, item.name)),
            item.metadata["doc"],
            item.metadata["allowed"],
        )
        for item in fields(schema)
        if not is_dataclass(hints[item.name])
    ]


def sections(schema: type, name: str = "", defaults: Any = None) -> Iterator[Section]:
    """``schema`` and all its sections, parents first. Names of settings are dotted.

    Defaults are those of the place where a section is used, which may differ from those of its class.
    """
    prefix, defaults = f"{name}." if name else "", defaults or schema()
    own = [replace(item, name=prefix + item.name) for item in describe(schema, defaults)]
    yield Section(name, " ".join((inspect.getdoc(schema) or "").split()), own)
    for item, hint in typing.get_type_hints(schema).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from sections(hint, prefix + item, getattr(defaults, item))


def _type_name(annotation: Any) -> str:
    return str(annotation).replace(" | None", " or null")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"
