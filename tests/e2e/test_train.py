"""Whole runs of the command on the shipped model: real engines, workers and Ray, a few steps each."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import metric_keys
import numpy as np
import pytest
import torch
from runs import ASKED, ROOT, SMALL, WARMUP, WHOLE, finish, stopped
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.metrics import names
from skyrl_spec.metrics.writers import read_jsonl
from skyrl_spec.settings.compose import load_config, to_yaml
from skyrl_spec.settings.schema import Config
from skyrl_spec.types import CANDIDATE, EARLIER, FROZEN, SERVED


def trained_positions(config: Config) -> int:
    draft = trained_kind(config.trainer)
    if draft is None:
        return 0
    return (
        config.trainer.mtp.unroll_steps
        or draft.settings(config.trainer).num_speculative_tokens
        or config.trainer.dflash.block_size - 1
    )


def expected_keys(config: Config, k: int, *, step: int = 1) -> set[str]:
    """Metric keys of step ``step``. The canaries check the sync of the first step."""
    canary = metric_keys.canary_keys(has_draft=trained_positions(config) > 0) if step == 1 else []
    return {*canary} | set(
        metric_keys.step_keys(
            num_trained_positions=trained_positions(config),
            num_speculative_tokens=k,
            n_samples_per_prompt=config.generator.n_samples_per_prompt,
            use_kl_loss=config.trainer.algorithm.use_kl_loss,
        )
    )


def test_a_run_with_a_draft_writes_what_the_contract_says(whole: tuple[Path, str, list[dict[str, Any]]]) -> None:
    run_dir, output, records = whole
    config = load_config(WHOLE)
    assert [record["trainer/step"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert records[0].keys() == {names.STEP, *metric_keys.eval_keys(3)}
    assert records[1].keys() == expected_keys(config, 3)
    assert records[2].keys() == expected_keys(config, 3, step=2) | set(metric_keys.lossless_keys())
    assert records[3].keys() == expected_keys(config, 3, step=3)
    assert records[5].keys() == records[3].keys() | set(metric_keys.eval_keys(3))
    assert all(records[step][names.LOSSLESS_GREEDY] == 1 for step in (2, 4))
    assert records[1][names.CANARY_FAVOURITES] == 1
    for record in records:
        assert all(math.isfinite(value) for value in record.values()), record
    assert [record["sync/policy_version"] for record in records[1:]] == [1, 2, 3, 4, 5]
    assert [record["sync/draft_version"] for record in records[1:]] == [1, 2, 3, 4, 5]
    # Trainer and engine compute the same log-probs: the same weights, both in fp32.
    assert all(record["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4 for record in records[1:])
    assert all(1.2 < record["vllm/train/draft_mean_acceptance_length"] <= 4.0 for record in records[1:])

    assert "rollout speed-up by the draft" in output
    assert "sync canary: checked 1x" in output
    assert "lossless canary: checked 2x, 100% of greedy responses equal" in output
    # The lines after these hold paths and commands of any length.
    table = output.split("\n  run ")[0]
    assert max(map(len, table.splitlines())) <= 100, "a line is wider than a terminal"
    assert "Warning" not in output
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1, 2, 3, 4, 5}
    assert (run_dir / "config.yaml").read_text() == to_yaml(load_config([*WHOLE, *ASKED, f"trainer.run_dir={run_dir}"]))
    assert list((run_dir / "wandb").glob("offline-run-*")), "wandb kept no offline run"
    trained = Qwen2ForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32).state_dict()
    shipped = Qwen2ForCausalLM.from_pretrained(
        ROOT / config.trainer.policy.model.path, dtype=torch.float32
    ).state_dict()
    assert any(not torch.equal(trained[name], shipped[name]) for name in shipped)


def test_a_run_whose_engines_choose_the_length_of_their_drafts(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_mtp_grpo", *SMALL, "trainer.eval_before_train=false", "trainer.eval_interval=0"]
    overrides += ["generator.speculation.schedule=auto", "trainer.mtp.num_speculative_tokens=5"]
    overrides += ["trainer.canary.lossless_interval=1"]
    output, records = finish(tmp_path / "run", *overrides)
    assert "generator.speculation.schedule=auto: measured the engines' steps in" in output
    assert "lossless canary: checked 2x, 100% of greedy responses equal" in output
    for record in records:
        lengths = {key: value for key, value in record.items() if key.startswith(names.LENGTH_AT_BATCH)}
        # A step samples 32 responses.
        assert max(int(key.rpartition("_")[2]) for key in lengths) in (16, 32)
        assert all(0 <= length <= 5 for length in lengths.values())
        # How much is a matter of the machine and its load.
        assert record[names.ESTIMATED_SPEEDUP] > 0
        assert record[names.EXPECTED_THROUGHPUT] > 0


def test_a_draft_that_is_trained_in_every_other_step(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_mtp_grpo", *SMALL, "trainer.max_training_steps=3", "trainer.eval_interval=0"]
    overrides += ["trainer.eval_before_train=false", "trainer.draft.train=every:2", "trainer.canary.interval=1"]
    _, records = finish(tmp_path / "run", *overrides)
    assert [record["sync/policy_version"] for record in records] == [1, 2, 3]
    assert [record["sync/draft_version"] for record in records] == [1, 1, 3]
    assert [names.DRAFT_LOSS in record for record in records] == [True, False, True]
    assert [record.get("timing/draft_train", 0) > 0 for record in records] == [True, False, True]
    # Engines draft with what the trainer holds, trained in this step or not.
    assert all(record[names.CANARY_DRAFT] < 1e-4 for record in records)


def test_a_draft_that_gets_worse_is_set_back_and_not_sent(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_mtp_grpo", *SMALL, "trainer.max_training_steps=3", "trainer.eval_interval=0"]
    overrides += ["trainer.eval_before_train=false", "trainer.draft.train=auto", "trainer.canary.interval=1"]
    # One update at this rate ruins the head.
    overrides += ["trainer.mtp.optimizer_config.lr=0.3", "trainer.mtp.positions_per_step=1.0"]
    _, records = finish(tmp_path / "run", *overrides)
    candidate, served, frozen, earlier = (
        [record.get(names.scored_acceptance_length(copy)) for record in records]
        for copy in (CANDIDATE, SERVED, FROZEN, EARLIER)
    )
    assert all(one < 0.9 * other for one, other in zip(candidate, served, strict=True))
    # All of them are the draft of the start.
    assert served == frozen
    assert earlier == [None, *served[1:]]
    assert [record[names.DRAFT_PUBLISHED] for record in records] == [0, 0, 0]
    assert [record["sync/draft_version"] for record in records] == [0, 0, 0]
    assert [record["sync/policy_version"] for record in records] == [1, 2, 3]
    assert all(record[names.DRAFT_GAIN] == 0 < record[names.DRAFT_COST] for record in records)
    assert all(record[names.CANARY_DRAFT] < 1e-4 for record in records)
    shipped = load_file(ROOT / load_config(overrides).trainer.policy.model.path / "model.safetensors")
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    heads = [name for name in shipped if ".mtp_layers." in name]
    assert all(torch.equal(saved[name], shipped[name].float()) for name in heads)


def test_a_run_in_stages_goes_on_with_divided_packs(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_dflash_grpo", *SMALL, "trainer.eval_before_train=false", "trainer.canary.interval=1"]
    megatron = "trainer.policy.megatron_config"
    stages = [f"{megatron}.pipeline_model_parallel_size=2", "trainer.ckpt_interval=1", "trainer.max_training_steps=1"]
    _, first = finish(tmp_path / "stages", *overrides, *stages)
    checkpoint = tmp_path / "stages" / "checkpoints" / "step_1"
    packs = [f"{megatron}.context_parallel_size=2", "trainer.max_training_steps=2"]
    go_on = ["trainer.resume_mode=from_path", f"trainer.resume_path={checkpoint}"]
    _, second = finish(tmp_path / "packs", *overrides, *packs, *go_on)
    assert [record["trainer/step"] for record in [*first, *second]] == [1, 2]
    for record in [*first, *second]:
        # Policy and draft of the engines are those of the workers.
        assert record[names.CANARY_POLICY] < 1e-4
        assert record[names.CANARY_DRAFT] < 1e-4
        assert record["draft/grad_norm"] > 0


def test_experts_on_two_ranks_go_on_on_one(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_moe_dflash_grpo", *SMALL, "trainer.eval_before_train=false"]
    overrides += ["trainer.canary.interval=1"]
    _, first = finish(tmp_path / "two", *overrides, "trainer.ckpt_interval=1", "trainer.max_training_steps=1")
    checkpoint = tmp_path / "two" / "checkpoints" / "step_1"
    go_on = ["trainer.resume_mode=from_path", f"trainer.resume_path={checkpoint}", "trainer.max_training_steps=2"]
    one = ["trainer.policy.megatron_config.expert_model_parallel_size=1", "trainer.algorithm.router_replay=true"]
    _, second = finish(tmp_path / "one", *overrides, *one, *go_on)
    assert [record["trainer/step"] for record in [*first, *second]] == [1, 2]
    for record in [*first, *second]:
        # Policy and draft of the engines are those of the workers.
        assert record[names.CANARY_POLICY] < 1e-4
        assert record[names.CANARY_DRAFT] < 1e-4
        assert record[names.LOGPROBS_DIFF_MAX] < 1e-4
        assert 0 <= record[names.EXPERT_LOAD_MIN] <= 1 <= record[names.EXPERT_LOAD_MAX] <= 4
    # An expert for itself, as in the checkpoint that the run began with.
    shipped = load_file(ROOT / load_config(overrides).trainer.policy.model.path / "model.safetensors")
    saved = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: one.shape for name, one in shipped.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        [
            "trainer.policy.megatron_config.tensor_model_parallel_size=2",
            "trainer.mtp.num_speculative_tokens=2",
            "generator.inference_engine.num_engines=2",
        ],
        pytest.param(
            [
                "trainer.placement.policy_num_gpus_per_node=2",
                "trainer.policy.megatron_config.use_distributed_optimizer=true",
                "trainer.policy.megatron_config.dtype=bf16",
                "trainer.mtp.loss_type=topk_soft_ce",
                "trainer.mtp.num_speculative_tokens=2",
                "trainer.mtp.unroll_steps=1",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tp2-two-engines", "dp2-bf16"],
)
def test_dapo_on_two_ranks_with_reference_and_importance_correction(tmp_path: Path, layout: list[str]) -> None:
    overrides = [
        "experiment=cpu_mtp_dapo",
        *SMALL,
        "trainer.eval_before_train=false",
        "trainer.algorithm.use_kl_loss=true",
        "trainer.algorithm.use_tis=true",
        "trainer.algorithm.clip_ratio_c=3",
        *layout,
    ]
    _, records = finish(tmp_path / "run", *overrides)
    assert [record["trainer/step"] for record in records] == [1, 2]
    for record in records:
        assert record.keys() >= expected_keys(load_config(overrides), 2, step=record["trainer/step"])
        assert all(math.isfinite(value) for value in record.values()), record
    # The policy does not change before its first update, so only later mini-batches add to the first step's KL.
    assert records[1]["policy/kl"] > 0


def test_an_interrupted_run_without_a_draft_leaves_nothing_behind(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_mtp_grpo", *SMALL, "trainer.mtp.enabled=false", "trainer.eval_before_train=false"]
    # Sums of six terms do not fit. Each file's are counted and printed once.
    overrides += ["trainer.max_prompt_length=13", "trainer.max_training_steps=50"]
    run, output = stopped(tmp_path / "run", overrides, signal.SIGINT, times=1)
    assert run.process.returncode == 128 + signal.SIGINT, output
    assert "skyrl-spec: SIGINT: stopped" in output
    for setting in ("data.train_data", "data.val_data"):
        assert output.count(f"skyrl-spec: {setting}: ") == 1
    assert output.count("prompts are longer than trainer.max_prompt_length=13 tokens and are skipped") == 2
    records = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    # Another step may end between the test's reading and its signal.
    assert len(records) <= 2, "it went on after the signal"
    # The run is the same without the draft.
    record = json.loads(records[0])
    assert record.keys() == expected_keys(load_config(overrides), 0)
    assert not [key for key in record if "draft" in key]
    assert record[names.CANARY_POLICY] < 1e-4


@pytest.mark.slow
def test_a_dflash_draft_trains_from_scratch_and_is_exported(tmp_path: Path) -> None:
    scratch = ["trainer.dflash.path=null", "trainer.dflash.num_layers=1", "trainer.dflash.target_layer_ids=null"]
    overrides = ["experiment=cpu_dflash_grpo", *SMALL, *scratch, "trainer.dflash.block_size=4"]
    output, records = finish(tmp_path / "run", *overrides)
    config = load_config(overrides)
    assert records[1].keys() == expected_keys(config, 3)
    assert [record["sync/draft_version"] for record in records[1:]] == [1, 2]
    assert all(record["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4 for record in records[1:])
    assert all(math.isfinite(value) for record in records for value in record.values())
    # The middle layer of twelve, and the first row of the vocabulary that no token uses.
    draft = json.loads((tmp_path / "run" / "draft" / "config.json").read_text())
    assert draft["dflash_config"] == {"mask_token_id": 104, "target_layer_ids": [6], "causal": False}
    started, trained = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("draft_start", "draft"))
    assert started.keys() == trained.keys()
    assert all(not torch.equal(started[name], trained[name]) for name in started), "a tensor was not trained"
    assert "--speculative-config" in output
    assert f"trainer.dflash.path={tmp_path / 'run' / 'draft'}" in output


@pytest.mark.slow
def test_a_warm_up_trains_the_draft_alone(tmp_path: Path) -> None:
    overrides = ["experiment=cpu_dflash_grpo", *WARMUP, f"trainer.warmup.run_dir={tmp_path / 'whole'}"]
    output, records = finish(tmp_path / "whole", *overrides, command="warmup-draft")
    assert [record["trainer/step"] for record in records] == [1, 2, 3]
    assert [record["sync/draft_version"] for record in records] == [1, 2, 3]
    assert [record["sync/policy_version"] for record in records] == [0, 0, 0]
    assert records[-1]["draft/loss"] < records[0]["draft/loss"]
    assert f"trainer.dflash.path={tmp_path / 'whole' / 'draft'}" in output
    started, trained = (load_file(tmp_path / "whole" / name / "model.safetensors") for name in ("draft_start", "draft"))
    assert started.keys() == trained.keys()
    assert all(not torch.equal(started[name], trained[name]) for name in started), "a tensor was not trained"
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_2", "step_3"]


def test_responses_that_were_cut_earn_nothing_and_train_nothing(tmp_path: Path) -> None:
    """No response ends within six tokens."""
    overrides = [
        "experiment=cpu_mtp_grpo",
        *SMALL,
        "trainer.max_training_steps=1",
        "generator.sampling_params.max_generate_length=6",
        "generator.zero_reward_on_non_stop=true",
        "generator.apply_overlong_filtering=true",
        "trainer.mtp.num_speculative_tokens=3",
    ]
    run_dir = tmp_path / "run"
    _, records = finish(run_dir, *overrides)
    assert records[-1][names.AVG_RAW_REWARD] == 0
    assert records[-1]["policy/grad_norm"] == records[-1]["draft/grad_norm"] == 0
    for step in (0, 1):
        dumped = read_jsonl(run_dir / "dumped_evals" / f"step_{step}.jsonl")
        assert len(dumped) == 128
        assert all(sample["step"] == step for sample in dumped)
        # These are not cut.
        score = records[step][names.EVAL_SCORE]
        assert np.mean([sample["reward"] for sample in dumped]) == pytest.approx(score)
