"""The command line, without starting a run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from skyrl_spec.cli import main
from skyrl_spec.settings.compose import load_config


def test_help_lists_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "experiment=cpu_mtp_grpo" in text
    listed = re.findall(r"^    ([a-z-]+)", text, flags=re.MULTILINE)
    assert listed == ["train", "warmup-draft", "compare", "eval-draft", "doctor", "layouts", "report", "export"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("skyrl-spec ")


def test_cfg_job_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["experiment=mimo_7b_dapo_8gpu", "trainer.seed=7"]
    assert main(["train", *overrides, "--cfg", "job"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed == OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(load_config(overrides))))
    assert printed.trainer.seed == 7
    assert printed.trainer.mtp.num_speculative_tokens == 3


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=cpu_mtp_grpo", "--cfg", "job", "trainer.seed=7", "-v", "trainer.epochs=3"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.trainer.seed, printed.trainer.epochs) == (7, 3)


@pytest.mark.parametrize("argv", [[], ["tarin"], ["train", "--verbos"], ["train", "--cfg", "hydra"], ["train", "-x"]])
def test_mistyped_commands_get_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("skyrl-spec: error: ")


def test_a_bad_value_gets_one_line_even_if_it_has_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "trainer.run_dir=a\nb"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_module_is_the_command_and_leaves_no_files(tmp_path: Path) -> None:
    """hydra by itself would create a folder outputs/ and change the directory."""
    command = [sys.executable, "-m", "skyrl_spec", "train", "experiment=cpu_mtp_dapo", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=True)
    assert "run_dir: runs/cpu_mtp_dapo" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
