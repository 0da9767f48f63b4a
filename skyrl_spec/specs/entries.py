"""Entries of a ``config.json``, checked where they are read, with the precedence that transformers and vLLM have."""

from __future__ import annotations

import math
from typing import Any

from skyrl_spec.errors import ConfigError


class Entries:
    """Entries of ``config``. null counts as missing. ``where`` begins the lines of errors: setting and directory."""

    def __init__(self, config: dict[str, Any], where: str):
        self._config, self.where = config, where

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least ``least``.

        Raises:
            ConfigError: it is something else, or it is missing and has no default.
        """
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(name, value, f"an integer of at least {least}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers of at least 0, not empty."""
        value = self._value(name, None)
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value)
        ):
            raise self._wrong(name, value, "a list of integers of at least 0")
        return tuple(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """An object; empty if it is missing."""
        value = self._config.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return value

    def architecture(self) -> str:
        """The first of ``architectures``, or "none"."""
        value = self._config.get("architectures") or ["none"]
        if not isinstance(value, list) or not isinstance(value[0], str):
            raise self._wrong("architectures", value, "a list of names")
        return value[0]

    def rope_theta(self, default: float | None = None) -> float:
        """Base of the rotary embedding. A ``rope_theta`` inside of ``rope`` wins over one beside it.

        Raises:
            ConfigError: the embedding is scaled, covers a part of the head only, or differs between layers.
        """
        rope = self.rope()
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            raise ConfigError(f"{self.where}: RoPE scaling {rope} is not supported; use a model with plain RoPE")
        for holder in (rope, self._config):
            share = holder.get("partial_rotary_factor")
            if share is not None and share != 1:
                raise ConfigError(
                    f"{self.where}: partial_rotary_factor={share} in config.json is not supported; use a model whose "
                    "rotary embedding covers whole heads"
                )
        if rope.get("rope_theta") is not None:
            return Entries(rope, self.where).number("rope_theta")
        return self.number("rope_theta", default)

    def rope(self) -> dict[str, Any]:
        """``rope_scaling``, the older name, or else ``rope_parameters``."""
        return self.section("rope_scaling") or self.section("rope_parameters")

    def contradictions(self) -> list[str]:
        """A line for each number that the file gives twice with different values."""
        lines, rope = [], self.rope()
        inside, beside = rope.get("rope_theta"), self._config.get("rope_theta")
        if inside is not None and beside is not None and inside != beside:
            lines.append(
                f"config.json has rope_theta={inside} inside of its RoPE entry and {beside} beside it; {inside} counts,"
                " as in transformers and vLLM"
            )
        older, newer = self.section("rope_scaling"), self.section("rope_parameters")
        if older and newer and older != newer:
            lines.append(
                f"config.json has rope_scaling={older} and rope_parameters={newer}; rope_scaling counts, as in "
                "transformers and vLLM"
            )
        types = {self._config[name] for name in ("dtype", "torch_dtype") if isinstance(self._config.get(name), str)}
        if len(types) > 1:
            lines.append(f"config.json has two types, {' and '.join(sorted(types))}; dtype counts, as in transformers")
        return lines

    def _value(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where}: config.json has no entry {name!r}; add it")
        return value

    def _wrong(self, name: str, value: Any, allowed: str) -> ConfigError:
        shown = repr(value)[:60]
        return ConfigError(f"{self.where}: {name}={shown} in config.json must be {allowed}; copy it again")
