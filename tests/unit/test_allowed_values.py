"""Allowed values of every setting: they are declared, and the first value outside them gets one line."""

from __future__ import annotations

import math

import pytest

from skyrl_spec.cli import SCHEMAS, main
from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.allowed import Choice, Range
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.describe import Setting, describe, sections
from skyrl_spec.settings.schema import Config

# Why a setting of this type needs no declaration.
UNRESTRICTED_TYPES = {
    "bool": "it has two values, and hydra refuses others",
    "str": "it is a name or a path, which is looked up",
    "list[str]": "its entries are files, which are looked up; rules.py checks trainer.logger and recompute_modules",
    "list[int]": "its entries are checked where they are used, against the draft or in eval-draft",
    "list[float]": "rules.py checks both entries of adam_betas",
    "dict[str, str]": "environment.custom is imported",
    "dict[str, Any]": "the receiver of the dictionary checks it: vLLM, transformers or an environment",
}
# Why a single number or word needs no declaration.
UNRESTRICTED_SETTINGS = {
    "generator.sampling_params.top_k": "rules.py checks it: at least 1, or -1",
    "generator.eval_sampling_params.top_k": "rules.py checks it: at least 1, or -1",
    "trainer.draft.train": "rules.py checks it: every_step, every:N or off",
    "generator.speculation.schedule": "schedule.py checks it: fixed, auto, or the rows of a table",
}
RUN_SETTINGS = [setting for section in sections(Config) for setting in section.settings]
RESTRICTED = [setting for setting in RUN_SETTINGS if setting.allowed is not None]


def wrong_values(setting: Setting) -> list[str]:
    """Values just outside the allowed ones, and those that are no finite number."""
    allowed = setting.allowed
    if not isinstance(allowed, Range):
        assert allowed is not None
        # A prefix, which must not be taken for the word.
        return ["unheard_of", allowed[0][:-1]]
    is_integer = setting.type_name.startswith("int")
    step = 1 if is_integer else 1e-6
    below = allowed.low if allowed.low_open else allowed.low - step
    values = [below, -math.inf] if not is_integer else [below]
    if not math.isinf(allowed.high):
        values.append(allowed.high if allowed.high_open else allowed.high + step)
    return [str(value) for value in values] + ([] if is_integer else ["nan", "inf"])


CASES = [(setting, value) for setting in RESTRICTED for value in wrong_values(setting)]


@pytest.mark.parametrize("schema", [Config, *SCHEMAS.values()])
def test_every_setting_declares_its_values_or_needs_no_declaration(schema: type) -> None:
    settings = RUN_SETTINGS if schema is Config else describe(schema)
    undeclared = {
        setting.name: setting.type_name.removesuffix(" or null") for setting in settings if setting.allowed is None
    }
    unexplained = {
        name: type_name
        for name, type_name in undeclared.items()
        if name not in UNRESTRICTED_SETTINGS and type_name not in UNRESTRICTED_TYPES
    }
    assert unexplained == {}


def test_explanations_are_needed() -> None:
    """An explanation of a setting or type that is gone, or that declares its values now, must go as well."""
    all_settings = [*RUN_SETTINGS, *(setting for schema in SCHEMAS.values() for setting in describe(schema))]
    undeclared = [setting for setting in all_settings if setting.allowed is None]
    assert UNRESTRICTED_SETTINGS.keys() <= {setting.name for setting in undeclared}
    assert UNRESTRICTED_TYPES.keys() == {
        setting.type_name.removesuffix(" or null")
        for setting in undeclared
        if setting.name not in UNRESTRICTED_SETTINGS
    }


@pytest.mark.parametrize("setting", RESTRICTED, ids=lambda setting: setting.name)
def test_defaults_are_allowed(setting: Setting) -> None:
    if setting.default == "null":
        assert setting.type_name.endswith(" or null")
    else:
        value = float(setting.default) if isinstance(setting.allowed, Range) else setting.default
        assert value in setting.allowed  # type: ignore[operator]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(["experiment=cpu_mtp_grpo"])


@pytest.mark.parametrize(("setting", "value"), CASES, ids=[f"{setting.name}={value}" for setting, value in CASES])
def test_a_wrong_value_gets_one_line(setting: Setting, value: str, config: Config) -> None:
    *path, name = setting.name.split(".")
    section = config
    for part in path:
        section = getattr(section, part)
    former = getattr(section, name)
    is_number = isinstance(setting.allowed, Range)
    typed = value if not is_number else int(value) if setting.type_name.startswith("int") else float(value)
    setattr(section, name, typed)
    try:
        with pytest.raises(ConfigError) as caught:
            validate(config)
    finally:
        setattr(section, name, former)
    must = " or ".join(allowed_words(setting)) if not is_number else str(setting.allowed)
    if is_number and not math.isfinite(float(value)):
        must = f"finite and {must}"
    line = str(caught.value)
    assert line.startswith(f"{setting.name}={typed}: must be {must}; ")
    assert "\n" not in line


def allowed_words(setting: Setting) -> Choice:
    assert isinstance(setting.allowed, tuple)
    assert not isinstance(setting.allowed, Range)
    return setting.allowed


EVAL_CASES = [
    (setting, value)
    for setting in describe(SCHEMAS["eval-draft"])
    if setting.allowed is not None
    for value in wrong_values(setting)
]


@pytest.mark.parametrize(
    ("setting", "value"), EVAL_CASES, ids=[f"{setting.name}={value}" for setting, value in EVAL_CASES]
)
def test_a_wrong_option_gets_one_line(setting: Setting, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At the command, so that the value is read from a word, too."""
    assert main(["eval-draft", "target=nowhere", f"{setting.name}={value}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skyrl-spec: error: {setting.name}=")
    assert ": must be " in line
