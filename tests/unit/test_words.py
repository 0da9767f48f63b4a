"""Command lines to copy: what they say is what the shell and hydra read."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from skyrl_spec.checkpoint.serving import serve_command
from skyrl_spec.settings.schema import TrainerConfig
from skyrl_spec.settings.words import setting_word


def read(word: str) -> object:
    """What hydra gets from a shell."""
    (text,) = shlex.split(word)
    return OverridesParser.create().parse_override(text).value()


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=20))
def test_any_path_is_read_as_it_is(path: str) -> None:
    assert read(setting_word("trainer.run_dir", path)) == path


@pytest.mark.parametrize(
    "path", ["null", "True", "12", ".5", "1e3", "a b", "it's", "a\\'b", "x\\", "a,b", "{a}", "$HOME", "~/x", " x "]
)
def test_paths_that_mean_something_else_without_quotes(path: str) -> None:
    assert read(setting_word("trainer.run_dir", path)) == path


def test_common_paths_need_no_quotes() -> None:
    for path in ("runs/cpu_mtp_grpo", "/data/models/Qwen3-8B", "./model", "../a/step_10"):
        assert setting_word("checkpoint", path) == f"checkpoint={path}"


def test_a_path_with_a_space_can_be_read_by_people() -> None:
    assert setting_word("out", "/my runs/x") == "\"out='/my runs/x'\""


def test_a_serve_command_survives_a_shell() -> None:
    trainer = TrainerConfig()
    trainer.dflash.enabled, trainer.dflash.num_speculative_tokens = True, 3
    words = shlex.split(serve_command(trainer, "/a b/model", "/it's/draft"))
    assert "/a b/model" in words
    assert '"/it\'s/draft"' in words[-1]
