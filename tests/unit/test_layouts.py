"""``skyrl-spec layouts``: what is listed fits and can be started, and its estimates follow from the settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from model_shapes import QWEN3_8B
from test_dry_run import MIMO_7B

from skyrl_spec.cli import main
from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.layouts import Estimate, candidates, find_layouts
from skyrl_spec.planning.memory import plan_memory
from skyrl_spec.planning.phases import key_bytes, phases
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.derived import longest_sequence, parallel_sizes
from skyrl_spec.settings.options import LayoutsOptions
from skyrl_spec.specs.model import load_spec


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(MIMO_7B))
    return ["experiment=mimo_7b_dapo_8gpu", f"trainer.policy.model.path={tmp_path}"]


def test_what_is_listed_fits_and_can_be_started(words: list[str]) -> None:
    config, options = load_config(words), LayoutsOptions(gpus=16)
    found = find_layouts(config, options)
    assert [one.step_s for one in found] == sorted(one.step_s for one in found)
    assert len({replace(one.layout, recompute=None) for one in found}) == len(found) > 20
    assert {one.layout.is_shared for one in found} == {True, False}
    # Composing one takes a fifth of a second.
    for one in found[:: len(found) // 20]:
        # As a user would paste it.
        pasted = load_config([*words, *one.layout.words(options.gpus_per_machine)])
        assert pasted == one.layout.applied(config, options.gpus_per_machine)
        validate(pasted)
        plan = plan_memory(pasted)
        assert max(phase.total for phase in phases(pasted, plan)) == one.fullest <= 76e9
        assert key_bytes(pasted, plan) >= plan.kv_bytes_per_token * longest_sequence(pasted)
        assert one.layout.gpus == 16
        assert parallel_sizes(pasted).world_size == one.layout.trainers


def _best(words: list[str], *more: str, **options: float) -> Estimate:
    return find_layouts(load_config([*words, *more]), LayoutsOptions(**options))[0]  # type: ignore[arg-type]


def test_estimates_follow_the_settings(words: list[str]) -> None:
    best = _best(words, gpus=8)
    # The arithmetic of training is the same in every layout, and divides among the GPUs.
    assert _best(words, gpus=16).training_s < 0.55 * best.training_s
    fast = _best(words, "trainer.hardware.mfu=0.6", gpus=8)
    assert 0.5 * best.training_s < fast.training_s < 0.6 * best.training_s
    assert _best(words, gpus=8, acceptance_length=1.0).sampling_s > 2 * best.sampling_s
    assert _best(words, gpus=8, response=8192).step_s > 2 * best.step_s
    # Larger GPUs allow all layouts of smaller ones, and need not recompute.
    small = find_layouts(load_config(words), LayoutsOptions(gpus=8, gpu_memory_gb=48))
    large = find_layouts(load_config(words), LayoutsOptions(gpus=8, gpu_memory_gb=141))
    assert {replace(one.layout, recompute=None) for one in small} <= {
        replace(one.layout, recompute=None) for one in large
    }
    assert large[0].layout.recompute is None
    assert small[0].step_s > large[0].step_s


def test_beside_training_the_longer_side_counts(words: list[str]) -> None:
    beside = find_layouts(load_config([*words, "trainer.fully_async.enabled=true"]), LayoutsOptions(gpus=8))
    assert all(one.step_s == max(one.sampling_s, one.training_s) + one.moves_s for one in beside)
    assert not any(one.layout.is_shared for one in beside)


def test_tensor_parallelism_stays_within_machines_and_divides_the_model(words: list[str]) -> None:
    config = load_config(words)
    spec = load_spec(config.trainer.policy.model.path, weights=False)
    found = list(candidates(config, spec, LayoutsOptions(gpus=16, gpus_per_machine=4)))
    assert {layout.tp for layout in found} == {layout.engine_tp for layout in found} == {1, 2, 4}
    assert all(layout.trainers <= 4 or layout.trainers % 4 == 0 for layout in found)


@pytest.mark.parametrize(
    ("more", "line"),
    {
        "": "gpus=0: must be at least 1; write gpus=N",
        "gpus=2 gpu_memory_gb=24": "gpus=2: no layout fits into GPUs of 24 GB, 4 GB of which are reserved: the least",
        "gpus=8 trainer.placement.device=cpu": "trainer.placement.device=cpu: layouts are those of GPUs",
        "gpus=8 gpu_memory_gb=0": "gpu_memory_gb=0.0: must be above 0",
        "gpus=8 gpu=9": "gpu: ",
        "gpus=8 trainer.algorithm.eps_clip_low=-1": "trainer.algorithm.eps_clip_low=-1.0: must be",
    }.items(),
)
def test_mistakes_get_one_line(words: list[str], more: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layouts", *words, *more.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"skyrl-spec: error: {line}"), error
    assert error.count("\n") == 1


def test_the_command_lists_and_names_the_words_of_the_first(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layouts", *words, "gpus=8", "show=2"]) == 0
    text = capsys.readouterr().out
    assert " layouts of 8 GPUs fit." in text.splitlines()[0]
    assert [line.split()[0] for line in text.splitlines()[3:5]] == ["1", "2"]
    assert "  trainer.placement.colocate_all=" in text


def test_replicas_of_every_parallelism_are_listed(words: list[str]) -> None:
    found = find_layouts(load_config(words), LayoutsOptions(gpus=16))
    for name in ("tp", "cp", "pp"):
        assert {getattr(one.layout, name) for one in found} >= {1, 2, 4}, name
    # Stages wait for each other, so that a pipeline alone is slower than replicas alone.
    seconds = {(one.layout.tp, one.layout.cp, one.layout.pp): one.training_s for one in reversed(found)}
    assert seconds[2, 1, 1] < seconds[2, 1, 2] < seconds[2, 1, 4]
    # With GPUs that have room for one more layer, but not for a replica.
    small = find_layouts(load_config(words), LayoutsOptions(gpus=8, gpu_memory_gb=40))
    assert all(one.layout.tp * one.layout.pp > 2 for one in small)


def test_a_draft_whose_settings_are_open_is_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    words = [f"trainer.policy.model.path={tmp_path}", "trainer.dflash.path=null", "trainer.dflash.num_layers=5"]
    found = find_layouts(load_config(["experiment=qwen3_8b_dflash_dapo_8gpu", *words]), LayoutsOptions(gpus=8))
    assert found[0].step_s > 0


def test_nothing_that_fits_is_an_error_with_the_least(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"the least that one takes is \d+ GB"):
        _best(words, gpus=1)
