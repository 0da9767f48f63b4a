"""What the shipped experiments are to reach, as their commands run them: minutes each, by ``make long``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, SKYRL_SPEC, SMALL, WARMUP, finish, launch, without_timings
from safetensors.torch import load_file

from skyrl_spec.metrics import names
from skyrl_spec.settings.compose import load_config
from skyrl_spec.types import FROZEN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HELD_OUT = ROOT / "examples" / "arithmetic_mtp" / "data" / "validation.jsonl"
SHIPPED_DFLASH = ROOT / "examples" / "arithmetic_dflash" / "draft"
TRAIN_ACCEPTANCE, EVAL_ACCEPTANCE = names.acceptance_length("train"), names.acceptance_length("eval")


def series(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if key in record]


def run(tmp_path: Path, experiment: str, command: str = "train") -> list[dict[str, Any]]:
    where = [f"trainer.warmup.run_dir={tmp_path / 'run'}"] if command == "warmup-draft" else []
    _, records = finish(tmp_path / "run", f"experiment={experiment}", *where, command=command, timeout_s=1700)
    return records


def acceptance_of(model: Path, draft: Path, out: Path) -> float:
    """Mean acceptance length of ``draft`` on held-out prompts answered by ``model``."""
    words = [f"target={model}", f"draft={draft}", f"prompts={HELD_OUT}", "num_speculative_tokens=[7]"]
    words += ["batch_sizes=[64]", "rounds=1", "max_generate_length=80", f"out={out}"]
    measured = launch(out.parent, [*SKYRL_SPEC, "eval-draft", *words])
    output = measured.output(timeout_s=420)
    assert measured.process.returncode == 0, output
    return json.loads(out.read_text())["measurements"][0]["mean_acceptance_length"]


def test_mtp(tmp_path: Path) -> None:
    records = run(tmp_path, "cpu_mtp_grpo")
    # Predicted for seven drafted tokens. The engines draft as many as pay.
    rewards, lengths = series(records, names.EVAL_SCORE), series(records, names.PREDICTED_ACCEPTANCE_LENGTH)
    assert rewards[-1] - rewards[0] >= 0.15
    assert lengths[-1] >= 3.5
    assert lengths[-1] > lengths[0]
    # Rewards moved the policy to words. The draft of the start knows few of them.
    frozen = series(records, names.scored_acceptance_length(FROZEN))
    assert sum(lengths[-4:]) >= 1.15 * sum(frozen[-4:])
    assert series(records, "policy/entropy")[-1] > 0.1


def test_dflash(tmp_path: Path) -> None:
    records = run(tmp_path, "cpu_dflash_grpo")
    rewards, lengths = series(records, names.EVAL_SCORE), series(records, TRAIN_ACCEPTANCE)
    assert rewards[-1] > rewards[0] + 0.1
    # Of some thousand drafts a step, which is more than one evaluation has.
    assert sum(lengths[-4:]) / 4 >= sum(lengths[:4]) / 4
    # The policy has moved away from the draft that the run began with; the trained one has followed it.
    model = tmp_path / "run" / "model"
    trained, frozen = (
        acceptance_of(model, draft, tmp_path / f"{name}.json")
        for name, draft in {"trained": tmp_path / "run" / "draft", "frozen": SHIPPED_DFLASH}.items()
    )
    assert trained >= frozen + 0.4


def test_mixture_of_experts(tmp_path: Path) -> None:
    records = run(tmp_path, "cpu_moe_dflash_grpo")
    rewards = series(records, names.EVAL_SCORE)
    assert rewards[-1] >= rewards[0] + 0.15
    assert series(records, TRAIN_ACCEPTANCE)[-1] >= 3.5
    assert series(records, EVAL_ACCEPTANCE)[-1] >= 3.5


def test_dflash_warmup(tmp_path: Path) -> None:
    records = run(tmp_path, "cpu_dflash_grpo", command="warmup-draft")
    assert series(records, EVAL_ACCEPTANCE)[-1] >= 3.5
    assert series(records, TRAIN_ACCEPTANCE)[0] < 1.5


def test_a_warm_up_resumes_bit_by_bit(tmp_path: Path) -> None:
    def overrides(name: str) -> list[str]:
        return ["experiment=cpu_dflash_grpo", *WARMUP, f"trainer.warmup.run_dir={tmp_path / name}"]

    _, records = finish(tmp_path / "whole", *overrides("whole"), command="warmup-draft")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_2"
    go_on = ["trainer.resume_mode=from_path", f"trainer.resume_path={checkpoint}"]
    _, resumed = finish(tmp_path / "parts", *overrides("parts"), *go_on, command="warmup-draft")
    assert [without_timings(record) for record in resumed] == [without_timings(records[2])]
    whole, again = (load_file(tmp_path / name / "draft" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


LAYOUTS = {
    "tp2": ["trainer.policy.megatron_config.tensor_model_parallel_size=2"],
    "dp2": ["trainer.placement.policy_num_gpus_per_node=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumes_bit_by_bit_on_two_ranks(tmp_path: Path, layout: str) -> None:
    overrides = ["experiment=cpu_mtp_grpo", *SMALL, "trainer.ckpt_interval=1", *LAYOUTS[layout]]
    _, records = finish(tmp_path / "whole", *overrides)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_1"
    go_on = ["trainer.resume_mode=from_path", f"trainer.resume_path={checkpoint}"]
    _, resumed = finish(tmp_path / "parts", *overrides, *go_on)
    assert [without_timings(record) for record in resumed] == [without_timings(records[2])]
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_warm_up_serves_an_mtp_head_from_scratch_on_two_ranks(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_mtp_grpo", *WARMUP, f"trainer.warmup.run_dir={tmp_path / 'run'}"]
    overrides += ["trainer.policy.megatron_config.tensor_model_parallel_size=2"]
    _, records = finish(tmp_path / "run", *overrides, command="warmup-draft")
    assert records[-1]["draft/loss"] < records[0]["draft/loss"]
    shipped = load_file(ROOT / load_config(overrides).trainer.policy.model.path / "model.safetensors")
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert trained.keys() == shipped.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor, shipped[name].float()) == ("mtp_layers" not in name), name
