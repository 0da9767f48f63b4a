"""The doctor finds every planted fault of ``faults.py``, and is silent on the shipped models.

``python tests/fidelity/test_doctor.py`` prints a table of what it found.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray
from faults import EXPERIMENTS, FAULTS, Fault, Rig, rig
from safetensors.torch import load_file, save_file

from skyrl_spec.cli import main
from skyrl_spec.controller import placement
from skyrl_spec.controller.checkpoints import Checkpointer
from skyrl_spec.controller.loop import TrainingLoop
from skyrl_spec.controller.run import Running, make_trainer
from skyrl_spec.doctor.command import _config
from skyrl_spec.doctor.files import file_findings
from skyrl_spec.doctor.finding import FAIL, OK, SKIPPED, WARN, Finding
from skyrl_spec.doctor.live import Patient
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.compose import available, load_config
from skyrl_spec.settings.options import DoctorOptions

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples"
PAIRS = {
    "mtp": [f"target={MODELS}/arithmetic_mtp/model"],
    "dflash": [f"target={MODELS}/arithmetic_dflash/model", f"draft={MODELS}/arithmetic_dflash/draft"],
    "no draft": [f"target={MODELS}/arithmetic_dflash/model"],
}
# Steps that move the weights as far as the command's own.
OVERRIDES = (
    "trainer.canary.on_mismatch=error",
    "trainer.policy.optimizer_config.lr=1e-4",
    "generator.sampling_params.max_generate_length=64",
)


def examine(running: Rig, fault: Fault) -> list[Finding]:
    """Findings up to the first failure, with ``fault`` there from the start."""
    for handle in (*running.engines.handles, *running.policy.handles):
        ray.get(handle.inject.remote(None))
    trainer = make_trainer(TrainingLoop, running.task, running.engines, running.policy, ["policy", "draft"])
    trainer.sync.sync()
    fault.inject(trainer)
    checkpointer = Checkpointer(trainer, running.policy)
    patient = Patient(Running(trainer, running.engines, running.policy, checkpointer, None), running.task)
    found: list[Finding] = []
    try:
        for finding in patient.findings():
            found.append(finding)
            if finding.state == FAIL:
                break
    except ray.exceptions.RayTaskError as error:
        found.append(Finding("engines and workers", FAIL, str(error.cause).splitlines()[0]))
    return found


def sightings(draft: str, folder: Path) -> Iterator[tuple[Fault, list[Finding]]]:
    with rig(draft, folder / draft, *OVERRIDES) as running:
        for fault in FAULTS:
            if fault.draft == draft:
                yield fault, examine(running, fault)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("draft", EXPERIMENTS)
def test_the_doctor_finds_every_planted_fault(draft: str, tmp_path: Path, ray_cluster: None) -> None:
    missed, false_alarms = [], []
    for fault, found in sightings(draft, tmp_path):
        failed = [finding for finding in found if finding.state == FAIL]
        if fault.name == "none":
            false_alarms += failed
        elif not failed:
            missed.append(fault.name)
    assert (missed, false_alarms) == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_doctor_is_silent_on_the_shipped_models(pair: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skyrl_spec", "doctor", *PAIRS[pair], f"out={tmp_path / 'doctor.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    code, text = done.returncode, done.stdout + done.stderr
    findings = [Finding(**item) for item in json.loads((tmp_path / "doctor.json").read_text())]
    assert code == 0, text
    assert {finding.state for finding in findings} <= {OK, SKIPPED}, text
    checks = [finding.check for finding in findings]
    assert {"policy = transformers", "engine as loaded", "engine after a sync", "export = transformers"} <= set(checks)
    assert ("draft by position" in checks) == (pair != "no draft")


def faulty_model(folder: Path, change: str) -> Path:
    """A copy of the DFlash example's model with a fault of its files."""
    model = folder / "model"
    shutil.copytree(MODELS / "arithmetic_dflash" / "model", model)
    tensors, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    if change == "a tied head that differs":
        config["tie_word_embeddings"] = True
    elif change == "a tied head that is stored":
        config["tie_word_embeddings"] = True
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif change == "a stray adapter":
        save_file({"x": tensors["model.norm.weight"]}, model / "adapter_model.safetensors")
    elif change == "a leftover shard":
        weight_map = dict.fromkeys(tensors, "model.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save_file({"x": tensors["model.norm.weight"]}, model / "old.safetensors")
    elif change == "two thetas":
        config["rope_theta"] = 5e5
    elif change == "a missing tensor":
        del tensors["model.norm.weight"]
    elif change == "another end token":
        config["eos_token_id"] = 7
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    ("change", "check", "state", "words"),
    [
        ("a tied head that differs", "output head", FAIL, "lm_head.weight differs"),
        ("a tied head that is stored", "output head", OK, "of which the file has an equal copy"),
        ("a stray adapter", "weights", FAIL, "vLLM would load adapter_model.safetensors too"),
        ("a leftover shard", "weights", WARN, "old.safetensors: not in"),
        ("two thetas", "config.json", WARN, "10000.0 counts"),
        ("a missing tensor", "weights", FAIL, "has no tensor model.norm.weight"),
        ("another end token", "end tokens", WARN, "config.json and generation_config.json at 7"),
    ],
)
def test_faults_of_files_are_found_before_anything_starts(
    change: str, check: str, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    model = faulty_model(tmp_path, change)
    overrides = ["experiment=cpu_dflash_grpo", f"trainer.policy.model.path={model}"]
    config = load_config([*overrides, f"trainer.run_dir={tmp_path / 'run'}"])
    found = [finding for finding in file_findings(config) if finding.check == check and finding.state == state]
    assert any(words in finding.seen for finding in found), found


@pytest.mark.parametrize("experiment", available("experiment"))
def test_every_experiment_has_a_short_form_that_its_settings_allow(experiment: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        options = DoctorOptions()
        words = [f"experiment={experiment}", f"trainer.policy.model.path={MODELS}/arithmetic_mtp/model"]
        validate(_config(options, words, stack))


def test_a_failure_ends_with_exit_code_1_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = faulty_model(tmp_path, "a missing tensor")
    assert main(["doctor", f"target={model}", f"out={tmp_path / 'doctor.json'}"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "fail    weights" in out
    assert out.splitlines()[-1] == f"2 ok, 1 fail; written to {tmp_path / 'doctor.json'}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "target='': must name a model, run or bundle; write target=DIR, or experiment=NAME"),
        (["draft=x", "experiment=cpu_mtp_grpo"], "draft=x: is used with target only; set trainer.dflash.path instead"),
        (["target=no/such/place"], "target=no/such/place: no such directory"),
        ([*PAIRS["mtp"], "trainer.epoch=3"], "trainer.epoch: unknown setting; did you mean trainer.epochs?"),
    ],
    ids=["nothing", "a draft alone", "no directory", "a mistyped setting"],
)
def test_mistakes_of_its_user(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err.startswith(f"skyrl-spec: error: {line}")


def table() -> None:
    print("| fault | draft | found by | what it says |\n|---|---|---|---|")
    with placement.ray_session(verbose=False), TemporaryDirectory() as folder:
        for draft in EXPERIMENTS:
            for fault, found in sightings(draft, Path(folder)):
                last = found[-1]
                seen = last.seen if last.state == FAIL else "-"
                check = last.check if last.state == FAIL else "nothing"
                print(f"| {fault.name} | {draft} | {check} | {seen[:160]} |", flush=True)


if __name__ == "__main__":
    sys.exit(table())
