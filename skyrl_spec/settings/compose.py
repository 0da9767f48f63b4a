"""Configurations composed by hydra from the schema, ``configs/`` and ``KEY=VALUE`` words, and options of commands.

Overrides are checked against the schema before hydra sees them, so that a mistyped one gets a single line that names
the setting. Nothing here imports torch. Hydra neither changes the directory nor writes files.
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

# Folders of configs/ from which a file is chosen by name, as in experiment=cpu_mtp_grpo.
GROUPS = ("experiment", "algorithm")

Options = TypeVar("Options")

# Errors that hydra itself does not catch: a file that includes itself, and a broken package line.
_UNCAUGHT_BY_HYDRA = (RecursionError, IndexError)

ConfigStore.instance().store(name="schema", node=Config)

_ROWS = "sequences are packed by their tokens; set trainer.max_tokens_per_microbatch"
# Settings of earlier versions, and what to set instead.
REMOVED = {
    "trainer.micro_train_batch_size_per_gpu": _ROWS,
    "trainer.micro_forward_batch_size_per_gpu": _ROWS,
    "trainer.policy.megatron_config.recompute_activations": (
        "set trainer.policy.megatron_config.recompute_granularity=full"
    ),
}


def load_config(overrides: list[str]) -> Config:
    """The configuration that ``overrides`` (``experiment=NAME``, ``trainer.epochs=2``, ...) describe.

    Values are checked later, by ``planning.validation.validate``.

    Raises:
        ConfigError: an unknown key or name, a wrong type, an override that cannot be parsed, or a mistake in a YAML
            file.
    """
    parsed = [_parse(override) for override in overrides]
    groups = {override.key_or_group: override.value() for override in parsed if override.key_or_group in GROUPS}
    for group, name in groups.items():
        _check_name(group, name)
    settings = [_nested(override) for override in parsed if override.key_or_group not in GROUPS]
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            composed = compose("config", overrides=[f"{group}={name}" for group, name in groups.items()])
        # Struct mode would refuse new entries of free-form dictionaries. The schema refuses unknown settings anyway.
        OmegaConf.set_struct(composed, False)
        values = OmegaConf.to_container(OmegaConf.merge(composed, *settings), resolve=True, throw_on_missing=True)
        # Values that came from interpolations are checked against the schema, too.
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, *_UNCAUGHT_BY_HYDRA) as error:
        raise ConfigError(_explain(error)) from error


def read_options(schema: type[Options], words: Sequence[str], command: str) -> Options:
    """Options of type ``schema``, read from ``KEY=VALUE`` words.

    Raises:
        ConfigError: a word is not KEY=VALUE, a key is unknown, or a value has the wrong type.
    """
    known = [item.name for item in fields(schema)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for word in words:
        key, equals, _ = word.partition("=")
        if key not in known or not equals:
            if key in known:
                raise ConfigError(f"{command}: option {word!r} has no value; write {key}=VALUE")
            hint = _did_you_mean(key, known) or f"; give one of {', '.join(f'{name}=...' for name in known)}"
            raise ConfigError(f"{command}: unknown option {word!r}{hint}")
        value = _parse(word).value()
        if _is_list(_type_of(key, schema)) and not isinstance(value, list | NoneType):
            if isinstance(value, dict):
                raise ConfigError(f"{key}={value}: must be a list; write {key}=[a,b]")
            value = [value]
        values[key] = value
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_value(error, schema)) from None


def to_yaml(config: Config) -> str:
    """``config`` as YAML, with every setting."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_dir() -> Path:
    """The folder ``configs/``: in the package if installed from a wheel, otherwise at the root of the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def available(group: str) -> list[str]:
    """Names that ``group=NAME`` accepts."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def _parse(text: str) -> Override:
    """One override from the command line. A leading ``+``, as SkyRL uses it, changes nothing."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        fix = f"quote special characters, as in '{key}=\"{value}\"'" if equals else "write KEY=VALUE"
        raise ConfigError(f"cannot read override {text!r}; {fix}") from error
    if override.is_delete() or override.is_sweep_override() or override.package is not None:
        raise ConfigError(f"cannot use override {text!r}: a setting takes exactly one value; write KEY=VALUE")
    return override


def _check_name(group: str, name: Any) -> None:
    names = available(group)
    if name not in names:
        hint = _did_you_mean(str(name), names)
        raise ConfigError(f"{group}={name}: no such {group}; choose one of {', '.join(names)}{hint}")


def _nested(override: Override) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` for ``a.b=1``.

    Raises:
        ConfigError: the key is unknown, or the value is not a list or section where the schema has one.
    """
    key = override.key_or_group
    value: Any = override.value()
    hint = _type_of(key)
    if isinstance(hint, type) and is_dataclass(hint) and not isinstance(value, dict):
        raise ConfigError(
            f"{key}={value}: {key} is a section; set one of its settings, as in {next(_settings(hint, f'{key}.'))}=..."
        )
    if value == "???":
        raise ConfigError(f"{key}=???: hydra reads ??? as a missing value; give a value, or null")
    if _is_list(hint) and not isinstance(value, list | NoneType) and "${" not in str(value):
        raise ConfigError(f"{key}={value}: must be a list; write '{key}=[{value}]'")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _type_of(key: str, schema: type = Config) -> Any:
    """The type of setting ``key`` in the schema. ``Any`` inside a free-form dictionary."""
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
    if key in REMOVED:
        return ConfigError(f"{key}: removed; {REMOVED[key]}")
    leaf = key.rsplit(".", 1)[-1]
    known = [*_settings(Config), *GROUPS]
    same_leaf = [setting for setting in known if setting.rsplit(".", 1)[-1] == leaf]
    return ConfigError(
        f"{key}: unknown setting{_did_you_mean(key, same_leaf or known) or '; --cfg job lists all settings'}"
    )


def _did_you_mean(word: str, known: list[str]) -> str:
    """The end of an error line about ``word``: the most similar ``known`` word. Empty if none is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _settings(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings in ``schema``, without the names of sections."""
    for name, hint in typing.get_type_hints(schema).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _settings(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _explain(error: Exception) -> str:
    """One line about an error of hydra, OmegaConf or the YAML reader."""
    if isinstance(error, IndexError):
        return f"{config_dir()}: the package line of a file cannot be read; begin it with '# @package _global_'"
    if isinstance(error, RecursionError):
        return f"{config_dir()}: a file includes or refers to itself; remove that line"
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
    """One line about a value that ``schema`` refuses."""
    key, reason = error.full_key or "", str(error).splitlines()[0].rstrip(".")
    if not key:
        return reason
    if key in GROUPS:
        return "the settings are not at the top level; begin the file with '# @package _global_'"
    try:
        expected = _type_name(_type_of(key.split("[")[0], schema))
    except ConfigError as unknown:
        return str(unknown)
    return f"{key}: {reason}; give {expected}"


def _without_none(hint: Any) -> Any:
    if isinstance(hint, UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not NoneType)
    return hint


def _is_list(hint: Any) -> bool:
    return typing.get_origin(_without_none(hint)) is list


def _is_dict(hint: Any) -> bool:
    return hint is Any or typing.get_origin(_without_none(hint)) is dict


def _type_name(hint: Any) -> str:
    """The type in plain words."""
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
