"""Random words on the command line, and random mistakes in an experiment's file, give a configuration or one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skyrl_spec.controller.warmup import warmup_config
from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings import compose
from skyrl_spec.settings.compose import config_dir, load_config, to_yaml
from skyrl_spec.settings.derived import parallel_sizes
from skyrl_spec.settings.schema import Config

EXPERIMENT = "experiment=cpu_mtp_grpo"
# A composition takes a tenth of a second.
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def names(section: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings and sections."""
    found = []
    for field in fields(section):
        value = getattr(section, field.name)
        found.append(prefix + field.name)
        if is_dataclass(value):
            found += names(value, f"{prefix}{field.name}.")
    return found


NAMES = names(Config())
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.one_of(
    st.integers(),
    st.integers(-2, 70),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 1e-300, 1e300, "1e999", "0x10", "1_000", "nan", "-inf"]),
)
plain = st.one_of(
    numbers, words, st.booleans(), st.sampled_from(["null", "true", "cpu", "cuda", "latest", "???", "[]"])
)
values = st.one_of(
    plain.map(str),
    st.lists(plain, max_size=4).map(lambda items: f"[{','.join(map(str, items))}]"),
    st.dictionaries(st.sampled_from(["method", "model", "num_speculative_tokens", "seed", "a"]), plain, max_size=3).map(
        lambda entries: f"{{{','.join(f'{key}: {value}' for key, value in entries.items())}}}"
    ),
    words.map(json.dumps),
    words.map(lambda word: f"${{{word}}}"),
)
overrides = st.tuples(st.sampled_from(NAMES), values).map("=".join)


def answer(arguments: list[str]) -> Config | str:
    """The configuration or the error line that the command makes first."""
    try:
        config = load_config(arguments)
        validate(config)
        parallel_sizes(config)
        warmup_config(config)
    except ConfigError as error:
        return " ".join(str(error).split())
    return config


def check(arguments: list[str]) -> None:
    found = answer(arguments)
    if isinstance(found, str):
        assert found
        assert len(found) < 2000
    else:
        # --cfg job prints it, and a checkpoint contains it.
        assert to_yaml(found)


@FEW
@given(st.lists(overrides, min_size=1, max_size=3))
def test_settings_of_any_value(arguments: list[str]) -> None:
    check([EXPERIMENT, *arguments])


@FEW
@given(st.lists(st.one_of(words, st.tuples(words, words).map("=".join)), min_size=1, max_size=2))
def test_words_of_any_kind(arguments: list[str]) -> None:
    check(arguments)


LINES = (config_dir() / "experiment" / "cpu_mtp_grpo.yaml").read_text().splitlines()
ODD_LINES = st.one_of(
    words,
    st.tuples(words, plain.map(str)).map(": ".join),
    st.tuples(st.sampled_from(NAMES).map(lambda name: name.rsplit(".", 1)[-1]), values).map(": ".join),
    st.sampled_from(
        ["trainer:", "- a", "  - b: [", "{", "a: *b", "a: &b", "<<: *a", "!!python/none x", "%YAML 9", "---", "\t",
         "defaults: [x]", "defaults:\n- experiment: cpu_mtp_grpo", "trainer: null", "data: []", "generator: 7", "1: 2",
         "null: 1", "[1, 2]: 3", "a: |", "a: 2026-01-01", "a: ${b}", "a: ${oc.env:NO_SUCH}", "? x",
         "# @package x", "trainer.epochs: 2"]
    ),
)  # fmt: skip
changes = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "indent"]),
    st.integers(0, len(LINES) - 1),
    st.integers(0, 8),
    ODD_LINES,
)


def changed(lines: list[str], change: tuple[str, int, int, str]) -> list[str]:
    kind, index, indent, odd = change
    new = {
        "replace": [" " * indent + odd],
        "insert": [lines[index % len(lines)], " " * indent + odd],
        "delete": [],
        "indent": [" " * indent + lines[index % len(lines)].strip()],
    }[kind]
    index %= len(lines)
    return [*lines[:index], *new, *lines[index + 1 :]] or [""]


@settings(parent=FEW, max_examples=150)
@given(st.lists(changes, min_size=1, max_size=3))
def test_an_experiment_of_a_user_with_mistakes(some: list[tuple[str, int, int, str]]) -> None:
    lines = LINES
    for change in some:
        lines = changed(lines, change)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        shutil.copytree(config_dir(), folder, dirs_exist_ok=True)
        (Path(folder) / "experiment" / "mine.yaml").write_text("\n".join(lines))
        patch.setattr(compose, "config_dir", lambda: Path(folder))
        check(["experiment=mine"])
