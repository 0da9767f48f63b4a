"""``setting``, which declares a dataclass field together with its documentation and allowed values."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from skyrl_spec.settings.allowed import Allowed


def setting(default: Any, doc: str, allowed: Allowed = None) -> Any:
    """A dataclass field with its documentation and allowed values.

    A callable ``default`` is called to make the default. ``allowed=None``: the type decides alone. None is allowed
    wherever the type has it.
    """
    metadata = {"doc": doc, "allowed": allowed}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
