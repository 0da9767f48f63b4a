"""The CPU examples' scripts, cut short (``make examples``); those for GPUs are read and planned."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, SMALL, launch, records_of

from skyrl_spec.metrics import names
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.compose import load_config

EXAMPLES = ROOT / "examples"
CPU = ("arithmetic_mtp", "arithmetic_dflash", "arithmetic_moe", "dapo", "own_dataset")
GPU = ("mimo_7b_dapo_8gpu", "qwen3_8b_dflash_8gpu", "search_r1", "several_machines")


def script(name: str) -> Path:
    return EXAMPLES / name / "run.sh"


def test_every_example_has_a_readme_and_a_script() -> None:
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == {*CPU, *GPU, "serve_bundle"}
    for name in folders:
        assert os.access(script(name), os.X_OK), name
        readme = (EXAMPLES / name / "README.md").read_text()
        assert f"examples/{name}/run.sh" in readme, name
        assert "Expected" in readme, name


@pytest.mark.parametrize("name", GPU)
def test_scripts_for_gpus_name_settings_that_are_valid(name: str) -> None:
    lines = re.sub(r"\\\n", " ", script(name).read_text()).splitlines()
    commands = [line.partition("skyrl-spec train ")[2] for line in lines if not line.startswith("#")]
    assert any(commands)
    for words in filter(None, commands):
        validate(load_config([word.strip('"') for word in words.split() if "=" in word and "$" not in word]))


@pytest.mark.examples
@pytest.mark.parametrize("name", CPU)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = launch(run_dir, [str(script(name)), *SMALL, f"trainer.run_dir={run_dir}"])
    output = run.output(timeout_s=400)
    assert run.process.returncode == 0, output
    assert [record[names.STEP] for record in records_of(run_dir)] == [0, 1, 2]
    assert f"skyrl-spec report {run_dir}" in output
    assert run.processes() == []


@pytest.mark.examples
def test_a_bundle_is_served(whole: tuple[Path, str, list[dict]]) -> None:
    """Serves the exported bundle with the command of its README, and sends it a request over HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = launch(whole[0], [str(script("serve_bundle")), str(whole[0]), str(port)])
    output = run.output(timeout_s=500)
    assert run.process.returncode == 0, output
    assert "--speculative-config" in output
    for prompt in ("7-2+9=", "3+8-4+6="):  # after few steps the model still guesses, in the form of its task
        assert re.search(rf"^{re.escape(prompt)}\n(.*\n)*?#### \d+$", output, flags=re.MULTILINE), output
    length = re.search(r"acceptance length (\d\.\d\d) \((\d+) drafts\)", output)
    assert length is not None, output
    assert 1 < float(length[1]) <= 4
    assert run.processes() == []


def test_own_dataset_and_reward_fit_on_a_screen(tmp_path: Path) -> None:
    source = EXAMPLES / "own_dataset" / "own.py"
    assert len(source.read_text().splitlines()) <= 40
    subprocess.run([sys.executable, str(source), str(tmp_path)], check=True, timeout=60)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 1024
    assert rows[0].keys() == {"prompt", "env_class", "reward_spec"}
