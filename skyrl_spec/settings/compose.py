"""From ``key=value`` words to a ``Config``: schema, ``configs/`` and command line composed by hydra; or to options.

The overrides are checked against the schema first, so that what a user mistypes is answered by one line that names
the setting. Nothing here imports torch, and hydra neither changes directory nor writes files.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.schema import Config

# Chosen by name from a folder of configs/, as in experiment=cpu_mtp_grpo.
GROUPS = ("experiment", "algorithm")

Options = TypeVar("Options")

# What hydra's readers of defaults and package lines raise where they did not look.
_HYDRAS_OWN = (RecursionError, IndexError)

ConfigStore.instance().store(name="schema", node=Config)


def load_config(overrides: list[str]) -> Config:
    """The configuration that ``overrides`` (``experiment=NAME``, ``trainer.epochs=2``, ...) describe.

    Raises ``ConfigError``, always one line, for whatever cannot be composed: unknown keys and names, wrong types,
    overrides that do not parse, mistakes in the YAML files. Values are not judged here: see ``validation.validate``.
    """
    parsed = [_parse(override) for override in overrides]
    groups = {override.key_or_group: override.value() for override in parsed if override.key_or_group in GROUPS}
    for group, name in groups.items():
        _check_name(group, name)
    settings = [_nested(override) for override in parsed if override.key_or_group not in GROUPS]
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            composed = compose("config", overrides=[f"{group}={name}" for group, name in groups.items()])
        # Struct mode would refuse new entries of free-form dictionaries; the schema itself refuses unknown settings.
        OmegaConf.set_struct(composed, False)
        values = OmegaConf.to_container(OmegaConf.merge(composed, *settings), resolve=True, throw_on_missing=True)
        # What interpolations brought is checked against the schema like everything else.
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, *_HYDRAS_OWN) as error:
        raise ConfigError(_explain(error)) from error


def read_options(schema: type[Options], words: Sequence[str], command: str) -> Options:
    """``words`` as a ``schema``.

    Raises:
        ConfigError: a word that is no KEY=VALUE, an unknown key, a value of another type.
    """
    known = [item.name for item in fields(schema)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for word in words:
        key, equals, _ = word.partition("=")
        if key not in known or not equals:
            hint = _did_you_mean(key, known) or f"; it takes {', '.join(f'{name}=...' for name in known)}"
            raise ConfigError(f"{command}: cannot use {word!r}{hint}")
        value = _parse(word).value()
        if _is_list(_type_of(key, schema)) and not isinstance(value, list | NoneType):
            if isinstance(value, dict):
                raise ConfigError(f"{key}={value}: expected a list, as in [a,b]")
            value = [value]
        values[key] = value
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_value(error, schema)) from None


def to_yaml(config: Config) -> str:
    """``config`` as YAML, every setting written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_dir() -> Path:
    """``configs/``: inside the package when installed from a wheel, at the root of a repository otherwise."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def available(group: str) -> list[str]:
    """The names ``group=NAME`` accepts."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def _parse(text: str) -> Override:
    """One override from the command line; SkyRL's habit of a leading ``+`` changes nothing."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        mend = f"quote special characters, as in '{key}=\"{value}\"'" if equals else "write KEY=VALUE"
        raise ConfigError(f"cannot read override {text!r}; {mend}") from error
    if override.is_delete() or override.is_sweep_override() or override.package is not None:
        raise ConfigError(f"cannot use override {text!r}: settings take one value each; write KEY=VALUE")
    return override


def _check_name(group: str, name: Any) -> None:
    names = available(group)
    if name not in names:
        hint = _did_you_mean(str(name), names)
        raise ConfigError(f"{group}={name}: no such {group}; available: {', '.join(names)}{hint}")


def _nested(override: Override) -> dict[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``, once the key is known and the value has the right shape."""
    key = override.key_or_group
    value: Any = override.value()
    hint = _type_of(key)
    if isinstance(hint, type) and is_dataclass(hint) and not isinstance(value, dict):
        raise ConfigError(
            f"{key}={value}: {key} is a section; set a field of it, as in {next(_settings(hint, f'{key}.'))}=..."
        )
    if value == "???":
        raise ConfigError(f"{key}=???: is hydra's word for a value that is missing; give one, or null")
    if _is_list(hint) and not isinstance(value, list | NoneType) and "${" not in str(value):
        raise ConfigError(f"{key}={value}: expected a list; write '{key}=[{value}]'")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _type_of(key: str, schema: type = Config) -> Any:
    """The schema's type of setting ``key``; ``Any`` inside a free-form dictionary."""
    hint: Any = schema
    for part in key.split("."):
        if _is_dict(hint):
            return Any
        hints = typing.get_type_hints(hint) if is_dataclass(hint) else {}
        if part not in hints:
            raise _unknown_key(key)
        hint = hints[part]
    return hint


def _unknown_key(key: str) -> ConfigError:
    leaf = key.rsplit(".", 1)[-1]
    known = [*_settings(Config), *GROUPS]
    same_leaf = [setting for setting in known if setting.rsplit(".", 1)[-1] == leaf]
    return ConfigError(
        f"{key}: unknown setting{_did_you_mean(key, same_leaf or known) or '; --cfg job lists them all'}"
    )


def _did_you_mean(word: str, known: list[str]) -> str:
    """The end of a line about a word that is not ``known``; empty where none is like it."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _settings(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings of ``schema``, without those of its sections themselves."""
    for name, hint in typing.get_type_hints(schema).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _settings(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _explain(error: Exception) -> str:
    """One line for what hydra, OmegaConf or the YAML reader found."""
    if isinstance(error, IndexError):
        return f"{config_dir()}: a file's package line cannot be read; begin it with '# @package _global_'"
    if isinstance(error, RecursionError):
        return f"{config_dir()}: a file there includes or refers to itself; take that out"
    message = " ".join(str(error).split()).split(" Config search path:")[0]
    file = re.match(r"In '([^']*)': ", message)
    where = f"{config_dir() / file[1]}.yaml: " if file else ""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return message
    return where + _explain_value(cause)


def _explain_value(error: OmegaConfBaseException, schema: type = Config) -> str:
    """One line for a value that ``schema`` refuses."""
    key, reason = error.full_key or "", str(error).splitlines()[0].rstrip(".")
    if not key:
        return reason
    if key in GROUPS:
        return "the settings are not at the top; begin the file with '# @package _global_'"
    try:
        expected = _type_name(_type_of(key.split("[")[0], schema))
    except ConfigError as unknown:
        return str(unknown)
    return f"{key}: {reason}; expected {expected}"


def _without_none(hint: Any) -> Any:
    if isinstance(hint, UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not NoneType)
    return hint


def _is_list(hint: Any) -> bool:
    return typing.get_origin(_without_none(hint)) is list


def _is_dict(hint: Any) -> bool:
    return hint is Any or typing.get_origin(_without_none(hint)) is dict


def _type_name(hint: Any) -> str:
    """What a user would call the type."""
    inner = _without_none(hint)
    if is_dataclass(inner):
        name = "a section"
    elif _is_list(hint):
        name = "a list, as in [a,b]"
    elif hint is Any:
        name = "a string"
    elif _is_dict(hint):
        name = "a dictionary, as in {a: 1}"
    else:
        name = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[inner]
    return name if inner is hint else f"{name}, or null"
