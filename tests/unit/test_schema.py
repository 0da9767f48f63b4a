"""The reference pages in docs/ describe every setting, command and metric, and are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import metric_keys
import pytest

from skyrl_spec.cli import SCHEMAS
from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.metrics.headline import headline
from skyrl_spec.metrics.reference import REFERENCE, description
from skyrl_spec.settings.compose import load_config, read_options
from skyrl_spec.settings.describe import describe, sections
from skyrl_spec.settings.options import EvalDraftOptions, ReportOptions
from skyrl_spec.settings.schema import Config

ROOT = Path(__file__).resolve().parents[2]


def test_every_setting_says_what_it_means() -> None:
    settings = [setting for section in sections(Config) for setting in section.settings]
    assert len(settings) > 100
    assert [setting.name for setting in settings if not setting.doc] == []
    for schema in SCHEMAS.values():
        assert [setting.name for setting in describe(schema) if not setting.doc] == []


def test_defaults_are_those_of_the_schema() -> None:
    by_name = {setting.name: setting for section in sections(Config) for setting in section.settings}
    assert by_name["trainer.algorithm.eps_clip_low"].default == "0.2"
    assert by_name["trainer.mtp.optimizer_config.lr"].default == "0.0001"
    assert by_name["trainer.policy.optimizer_config.adam_betas"].default == "[0.9,0.95]"
    assert by_name["trainer.mtp.unroll_steps"].default == "null"
    assert by_name["trainer.mtp.unroll_steps"].type_name == "int or null"
    clip = by_name["trainer.algorithm.clip_ratio_c"]
    assert clip.doc.startswith("Bound c > 1 of the dual-clip objective")
    assert clip.allowed_text == "above 1"
    assert by_name["trainer.placement.device"].allowed_text == "cpu, cuda"


def test_every_metric_is_described_and_no_other() -> None:
    keys = {
        *metric_keys.step_keys(
            num_trained_positions=3, num_speculative_tokens=3, n_samples_per_prompt=8, use_kl_loss=True
        ),
        *metric_keys.canary_keys(has_draft=True),
        *metric_keys.lossless_keys(),
        *metric_keys.eval_keys(3),
        *metric_keys.schedule_keys([1, 128], is_auto=True),
        *metric_keys.auto_training_keys(),
        names.NUM_SAMPLE_BATCHES,
        names.NUM_KEPT_GROUPS,
        names.NUM_TURNS,
        names.STALENESS,
        names.SPANS,
        names.SPANNING,
        names.acceptance_after_updates(1),
        names.TRAINER_IDLE,
        names.ENGINES_IDLE,
        names.timing("moves"),
        names.EXPERT_LOAD_MAX,
        names.EXPERT_LOAD_MIN,
    }
    steps = [{names.STEP: step, **dict.fromkeys(keys - {names.STEP}, 1.0)} for step in (1, 2)]
    keys |= headline(steps, speedup=1.5).keys()
    assert sorted(key for key in keys if description(key) is None) == []
    described = {description(key) for key in keys}
    assert [entry.key for entry in REFERENCE if entry not in described] == []


def test_the_pages_are_what_the_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reference.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_page_waits_for_a_number() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]
    assert len(pages) > 20
    waiting = [str(page) for page in pages if re.search(r"\b(EXPECTED|EVAL|COMPARE)_[A-Z]+\b", page.read_text())]
    assert waiting == []


def test_options_are_typed_words() -> None:
    options = read_options(EvalDraftOptions, ["target=a/b", "batch_sizes=[1,2]", "prompts=x.txt"], "eval-draft")
    assert (options.target, options.batch_sizes, options.prompts) == ("a/b", [1, 2], ["x.txt"])
    assert options.rounds == EvalDraftOptions().rounds


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["target"], "eval-draft: option 'target' has no value; write target=VALUE"),
        (["tarhet=x"], "did you mean target?"),
        (["rounds=many"], "rounds: Value 'many' of type 'str' could not be converted to Integer; give an integer"),
        (["batch_sizes=[a]"], "batch_sizes"),
        (["--x=1"], "eval-draft: unknown option '--x=1'"),
        (["target="], ""),
    ],
)
def test_mistaken_options_get_one_line(words: list[str], expected: str) -> None:
    if not expected:
        # The command refuses an empty target later.
        assert read_options(EvalDraftOptions, words, "eval-draft").target == ""
        return
    with pytest.raises(ConfigError) as caught:
        read_options(EvalDraftOptions, words, "eval-draft")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_without_words_are_the_defaults() -> None:
    assert read_options(ReportOptions, [], "report") == ReportOptions()
    assert load_config([]).trainer.dry_run is False
