"""``trainer.dry_run``: its output, and that it writes nothing. tests/megatron/test_plan.py checks the numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from skyrl_spec.cli import main
from skyrl_spec.drafts.kinds.offloads import deepest_sleep
from skyrl_spec.evaluation.arms import arms
from skyrl_spec.evaluation.compare import asked, is_done
from skyrl_spec.planning.facts import plan_facts, readable
from skyrl_spec.planning.memory import MemoryPlan, count, count_on_rank, plan_memory, trained_draft_shapes
from skyrl_spec.planning.phases import largest_model, move_seconds, phase_facts, phases
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.options import CompareOptions
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "experiment=cpu_mtp_grpo"],
        ["train", "experiment=cpu_dflash_grpo", "trainer.dflash.path=null"],
        ["warmup-draft", "experiment=cpu_dflash_grpo"],
        ["compare", "experiment=cpu_dflash_grpo"],
        ["compare", "experiment=cpu_dflash_grpo", "generator.speculation.schedule=[[1,8,7],[9,512,3]]"],
    ],
    ids=lambda words: words[0],
)
def test_the_plan_is_printed_and_nothing_else_happens(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*words, "trainer.dry_run=true", f"trainer.run_dir={run_dir}"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines()[:-1])
    assert {"model", "draft", "steps", "run", "processes", "worker", "engine", "sync", "checkpoint", "tokens"} <= set(
        facts
    )
    assert ("runs" in facts) == (words[0] == "compare")
    assert out.splitlines()[-1] == "dry run: settings, model, data and devices fit; nothing was started or written"
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("words", "packs"),
    [
        ([], "4,096 tokens; old log-probs from a forward pass before the updates"),
        (["trainer.max_tokens_per_microbatch=232"], "232 tokens; old log-probs from"),
        (
            ["trainer.max_tokens_per_microbatch=231"],
            "231 tokens (sequences of up to 232 have a pack to themselves); old",
        ),
        (
            ["trainer.policy_mini_batch_size=16"],
            "4,096 tokens; old log-probs from the update itself, the only one of a",
        ),
        (
            ["trainer.policy_mini_batch_size=16", "trainer.update_epochs_per_batch=2"],
            "4,096 tokens; old log-probs from a",
        ),
    ],
)
def test_the_plan_says_how_sequences_are_packed(
    words: list[str], packs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "experiment=cpu_mtp_grpo", "trainer.dry_run=true", f"trainer.run_dir={tmp_path / 'run'}", *words]
    assert main(words) == 0
    assert re.search(rf"^packs +{re.escape(packs)}", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_plan_for_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    words = ["train", "experiment=cpu_mtp_grpo", "trainer.placement.device=cuda", "trainer.measure_speedup=false"]
    words.append("trainer.logger=[console,wandb]")
    assert main([*words, "trainer.dry_run=true", f"trainer.run_dir={tmp_path / 'run'}"]) == 0
    out, err = capsys.readouterr()
    for line, what in zip(
        err.splitlines(),
        ("trainer.logger=[wandb]: wandb has no key", "trainer.placement.device=cuda: no CUDA"),
        strict=True,
    ):
        assert line.startswith(f"skyrl-spec: warning: this machine cannot start the run: {what}")
    assert re.search(r"^GPUs +2$", out, flags=re.MULTILINE)
    # It is an error in a real run.
    assert main([*words, f"trainer.run_dir={tmp_path / 'run'}"]) == 2


def test_mistakes_are_found_in_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "experiment=cpu_mtp_grpo", "trainer.dry_run=true", f"trainer.run_dir={tmp_path / 'run'}"]
    assert main([*words, "trainer.max_prompt_length=2"]) == 2
    assert "trainer.max_prompt_length=2: all 4096 prompts of data.train_data are longer" in capsys.readouterr().err


def test_a_warm_up_and_frozen_and_absent_drafts_take_less() -> None:
    config = load_config(["experiment=cpu_dflash_grpo"])
    run, warmup = plan_memory(config), plan_memory(config, trains_policy=False)
    draft = 4 * count(trained_draft_shapes(config, load_spec(config.trainer.policy.model.path)))
    assert (warmup.sync, warmup.checkpoint) == (draft, 3 * draft)
    assert warmup.worker.gradients == draft < run.worker.gradients
    assert warmup.worker.weights == run.worker.weights
    frozen, none = (plan_memory(arm.config) for arm in arms(config, CompareOptions())[1:])
    assert frozen.engine_weights == run.engine_weights == none.engine_weights + draft
    assert frozen.kv_bytes_per_token == run.kv_bytes_per_token > none.kv_bytes_per_token
    dapo = load_config(["experiment=cpu_mtp_dapo"])
    assert (
        plan_memory(dapo).tokens_per_step == 4 * plan_memory(load_config(["experiment=cpu_mtp_grpo"])).tokens_per_step
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compare", "trainer.dflash.path=null"], "trainer.dflash.path=null: a frozen draft with random weights"),
        (["compare", "trainer.dflash.enabled=false"], "compare needs a draft"),
        (["compare", "arms=[trained,sometimes]"], "arms=[trained,sometimes]: sometimes must be trained, auto, every:N"),
        (["compare", "arms=[every:0]"], "arms=[every:0]: every:0 must be trained, auto, every:N"),
        (["compare", "arms=[none,none]"], "arms=[none,none]: must name at least one arm, and none twice"),
        (["compare", "arms=[]"], "arms=[]: must name at least one arm"),
        (["compare", "seeds=0"], "seeds=0: must be at least 1"),
        (["compare", "seeds=two"], "seeds: Value 'two' of type"),
        (
            ["compare", "trainer.resume_mode=from_path", "trainer.resume_path=/x"],
            "trainer.resume_mode=from_path: must be latest or null",
        ),
        (
            ["train", "trainer.resume_mode=from_path", "trainer.resume_path=/x"],
            "trainer.resume_path=/x: no such directory",
        ),
    ],
)
def test_what_a_run_refuses_a_dry_run_refuses(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], "experiment=cpu_dflash_grpo", *words[1:], "trainer.dry_run=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_comparison_goes_on_with_what_is_done_and_no_more(tmp_path: Path) -> None:
    words = ["experiment=cpu_dflash_grpo", f"trainer.run_dir={tmp_path}", "trainer.resume_mode=latest"]

    def frozen(words: list[str]) -> Config:
        return next(arm.config for arm in arms(load_config(words), CompareOptions()) if arm.name == "frozen")

    assert not is_done(frozen(words))
    (tmp_path / "frozen").mkdir()
    # The file of a finished arm that was started without resuming.
    (tmp_path / "frozen" / "compared.yaml").write_text(asked(frozen(words[:2])))
    assert is_done(frozen(words))
    assert not is_done(frozen(words[:2])), "a comparison that begins repeats all"
    assert not is_done(frozen([*words, "trainer.max_training_steps=60"]))


def test_arms_differ_in_the_draft_and_seeds_in_the_seed() -> None:
    config = load_config(["experiment=cpu_dflash_grpo", "trainer.seed=5", "generator.speculation.schedule=[[1,8,7]]"])
    runs = arms(config, CompareOptions(["trained", "auto", "every:4", "frozen", "none"], seeds=2))
    assert [(run.name, run.seed) for run in runs[4:7]] == [("none", 5), ("trained", 6), ("auto", 6)]
    assert [run.folder for run in runs[2:4]] == ["every_4/seed_5", "frozen/seed_5"]
    assert len({run.config.trainer.run_dir for run in runs}) == len({run.config.trainer.run_name for run in runs}) == 10
    assert all(run.config.trainer.seed == run.seed for run in runs)
    assert [run.config.trainer.draft.train for run in runs[:3]] == ["every_step", "auto", "every:4"]
    frozen, none = runs[3].config, runs[4].config
    assert not frozen.trainer.dflash.enabled
    assert frozen.generator.inference_engine.speculative_config is not None
    assert frozen.generator.speculation.schedule != "fixed"
    assert none.generator.inference_engine.speculative_config is None
    # With one seed, folders are the arms.
    assert [run.folder for run in arms(config, CompareOptions())] == ["trained", "frozen", "none"]


# As published.
MIMO_7B = {
    "architectures": ["MiMoForCausalLM"],
    "vocab_size": 151680,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 640000,
    "max_position_embeddings": 32768,
    "num_nextn_predict_layers": 1,
    "attention_bias": True,
}


def test_sizes_of_a_large_model(tmp_path: Path) -> None:
    """MiMo-7B's checkpoint has 7.83 billion parameters with the head."""
    (tmp_path / "config.json").write_text(json.dumps(MIMO_7B))
    config = load_config(["experiment=mimo_7b_dapo_8gpu", f"trainer.policy.model.path={tmp_path}"])
    plan = plan_memory(config)
    # bf16: 2 bytes each in a sync; 2 + 4 + 8 in a checkpoint.
    assert plan.sync == pytest.approx(2 * 7.83e9, rel=0.01)
    assert plan.checkpoint == 7 * plan.sync
    # Four ranks. There is one data-parallel rank, so that the distributed optimizer divides nothing.
    assert plan.worker.optimizer == pytest.approx(12 * 7.83e9 / 4, rel=0.01)
    # On GPUs AdamW updates all parameters at once. That takes more memory than the activations, freed by then.
    assert plan.worker.update == pytest.approx(4 * 7.83e9 / 4, rel=0.01)
    assert plan.worker.update > plan.worker.activations
    lasting = plan.worker.weights + plan.worker.gradients + plan.worker.optimizer
    assert plan.worker.total == lasting + plan.worker.update
    assert plan.kv_bytes_per_token == 2 * 37 * 8 * 128 * 2
    assert "8" in plan_facts(config, plan)["GPUs"]


def test_the_plan_says_what_sampled_drafts_and_sampling_beside_training_take() -> None:
    words = ["experiment=cpu_mtp_grpo", "generator.inference_engine.max_num_seqs=10"]
    plain = load_config(words)
    assert plan_memory(plain).draft_probs == 0
    assert "asynchronous" not in plan_facts(plain, plan_memory(plain))
    sampled = load_config([
        *words, "generator.speculation.draft_sample_method=probabilistic", "trainer.fully_async.enabled=true"
    ])  # fmt: skip
    # Two copies, ten responses, seven tokens, 104 words of four bytes.
    assert plan_memory(sampled).draft_probs == 2 * 10 * 7 * 104 * 4
    facts = plan_facts(sampled, plan_memory(sampled))
    assert "distributions of drafts, at most 58.2 kB" in facts["engine"]
    assert "the loss is anchored on the log-probs that they were sampled with" in facts["asynchronous"]
    assert facts["packs"].endswith("old log-probs from the engines")
    corrected = load_config([*words, "trainer.fully_async.enabled=true", "trainer.algorithm.use_tis=true"])
    assert "use_tis corrects the loss" in plan_facts(corrected, plan_memory(corrected))["asynchronous"]


def _colocated(tmp_path: Path, level: int, *words: str) -> tuple[Config, MemoryPlan]:
    """MiMo-7B on eight GPUs that workers and engines share."""
    (tmp_path / "config.json").write_text(json.dumps(MIMO_7B))
    engine = "generator.inference_engine"
    shared = [f"{engine}.num_engines=8", f"{engine}.sleep_level={level}", f"{engine}.gpu_memory_utilization=0.5"]
    shared += ["trainer.placement.colocate_all=true", "trainer.placement.policy_num_gpus_per_node=8"]
    model = f"trainer.policy.model.path={tmp_path}"
    config = load_config(["experiment=mimo_7b_dapo_8gpu", model, *shared, *words])
    return config, plan_memory(config)


def test_engines_and_workers_take_turns_in_the_plan(tmp_path: Path) -> None:
    for level in (0, 1, 2):
        config, plan = _colocated(tmp_path, level, "trainer.algorithm.use_kl_loss=true")
        sampling, training, sync, save = phases(config, plan)
        worker = plan.worker
        # Beside an engine that keeps its memory nothing moves.
        lasting = 0 if level else worker.weights + worker.gradients + worker.optimizer + worker.reference
        assert sampling.gpu == save.gpu == {"engine": 40e9, "worker": lasting}
        # The reference has gone when the updates begin.
        assert training.gpu["worker"] == worker.total - (worker.reference if level else 0)
        assert sync.gpu["worker"] == lasting or worker.weights
        awake = 40e9 if level == 0 else 0
        assert (training.gpu["engine"], sync.gpu["engine"]) == (awake, awake or plan.engine_weights)
        copies = worker.optimizer + worker.weights + worker.reference if level else 0
        asleep = {"engine's weights": plan.engine_weights} if level == 1 else {}
        assert sampling.host == training.host == sync.host == {"worker": copies} | asleep
    seconds = move_seconds(config, plan)
    assert seconds["optimizer state"] == pytest.approx(2 * worker.optimizer / 25e9)
    assert seconds["engine's weights"] == 0
    assert move_seconds(*_colocated(tmp_path, 1))["engine's weights"] == pytest.approx(2 * plan.engine_weights / 25e9)


def test_engines_do_not_lose_what_no_sync_brings(tmp_path: Path) -> None:
    config, _ = _colocated(tmp_path, 2)
    assert deepest_sleep(config) == 2
    assert deepest_sleep(config, trains_policy=False) == 1
    frozen, _ = _colocated(
        tmp_path, 2, "trainer.mtp.enabled=false",
        "generator.inference_engine.speculative_config={method: mtp, num_speculative_tokens: 3}",
    )  # fmt: skip
    assert deepest_sleep(frozen) == 1
    without, _ = _colocated(tmp_path, 2, "trainer.mtp.enabled=false")
    assert deepest_sleep(without) == 2


def test_each_part_stays_if_its_setting_says_so(tmp_path: Path) -> None:
    stay = ["trainer.policy.optimizer_config.offload_after_step=false", "trainer.algorithm.use_kl_loss=true"]
    config, plan = _colocated(tmp_path, 1, *stay)
    spec = load_spec(str(tmp_path), weights=False)
    of_draft = count_on_rank(trained_draft_shapes(config, spec), 4)
    assert plan.offloaded.gradients == 4 * of_draft
    assert plan.offloaded.optimizer == pytest.approx(12 * of_draft / 2, abs=4)
    config, plan = _colocated(tmp_path, 1, *stay, "trainer.mtp.optimizer_config.offload_after_step=false")
    assert (plan.offloaded.gradients, plan.offloaded.optimizer) == (0, 0)
    assert (plan.offloaded.weights, plan.offloaded.reference) == (plan.worker.weights, plan.worker.reference)
    config, plan = _colocated(
        tmp_path, 1, *stay, "trainer.policy.megatron_config.cpu_offload=false", "trainer.ref.cpu_offload=false"
    )
    assert (plan.offloaded.weights, plan.offloaded.reference) == (0, 0)


def test_the_plan_says_what_fits(tmp_path: Path) -> None:
    config, plan = _colocated(tmp_path, 1)
    facts = phase_facts(config, plan)
    assert facts["in sampling"].startswith("engine 40.0 GB on the GPU; in host memory worker 1")
    one = plan.kv_bytes_per_token * 10_240
    assert f": {int((40e9 - plan.engine_weights) // one)} sequences of 10,240 tokens" in facts["room for keys"]
    assert "does not fit" not in "".join(facts.values())
    # A GPU that training just fills, and one a little smaller.
    exact = plan.worker.total / 1e9
    config.generator.inference_engine.gpu_memory_utilization = 1.0
    config.trainer.hardware.gpu_memory_gb = exact
    assert largest_model(config, plan) == pytest.approx(plan.num_parameters, rel=1e-6)
    assert "does not fit" not in phase_facts(config, plan)["in training"]
    config.trainer.hardware.gpu_memory_gb = 0.99 * exact
    assert largest_model(config, plan) < plan.num_parameters
    assert phase_facts(config, plan)["in training"].startswith(
        f"worker {readable(plan.worker.total)} on the GPU: does not"
    )
    assert not facts.keys() & plan_facts(config, plan).keys()
    on_cpu = load_config(["experiment=cpu_mtp_grpo"])
    assert phase_facts(on_cpu, plan_memory(on_cpu)) == {}


def test_readable_sizes() -> None:
    assert [readable(size) for size in (0, 999, 1000, 99_950, 1.25e6, 999.9e6, 1e9, 123.4e9, 5e15)] == [
        "0 B", "999 B", "1.0 kB", "100.0 kB", "1.2 MB", "1000 MB", "1.0 GB", "123 GB", "5000 TB",
    ]  # fmt: skip
    assert count({"a": (2, 3), "b": (4,)}) == 10
